"""The language model: embeddings to hidden states to logits."""

import torch
from torch import Tensor, nn

from qwen2audio_core import ops
from qwen2audio_core.cache import KVCache
from qwen2audio_core.config import TextConfig
from qwen2audio_core.linear import Embedding, Linear


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.rms_norm_op = ops.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.rms_norm_op(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; G < H makes it grouped-query attention."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rope_op = ops.rope
        self.attention_op = ops.sdpa

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, key_start: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(heads)  # (B, T, H, C)
        k = self.k_proj(x).view(heads)  # (B, T, G, C)
        v = self.v_proj(x).view(heads)
        q, k = self.rope_op(q, k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, S, G, C)
        y = self.attention_op(q, k, v, causal=True, key_start=key_start)
        return self.o_proj(y.reshape(x.shape))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.swiglu_op = ops.swiglu

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.swiglu_op(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer: attention, then a gated MLP."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, key_start: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, key_start, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The trunk (`language_model.model` in the checkpoint)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        key_start: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run every layer.

        x          (B, T, D)  embeddings; with a cache, those of the tokens not yet in it
        positions  (B, T)  integers, counted from each row's first real token
        key_start  (B,)  first real position of left-padded rows
        cache      written by every layer; the caller advances it
        returns    (B, T, D)  normed hidden states
        """
        cos, sin = ops.rope_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, key_start, cache)
        return self.norm(x)


class CausalLM(nn.Module):
    """Trunk and output head (`language_model` in the checkpoint). The head is never tied."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
