"""Log-mel spectrogram to audio states: a Whisper encoder with an average pool behind it.

F mel frames of 10 ms become T positions of 20 ms, the conv frames, and A audio tokens of 40 ms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2audio_core import ops
from qwen2audio_core.config import AudioConfig
from qwen2audio_core.linear import Drawn, Embedding, Linear


class LayerNorm(Drawn, nn.LayerNorm):
    """nn.LayerNorm (eps 1e-5) with a slot for its arithmetic."""

    def __init__(self, width: int):
        super().__init__(width)
        self.layer_norm_op = ops.layer_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm_op(x, self.weight, self.bias, self.eps)


class EncoderAttention(nn.Module):
    """Self-attention over all valid positions of a clip. The key projection has no bias."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        width = config.d_model
        self.head_dim = config.head_dim
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)
        self.attention_op = ops.sdpa

    def forward(self, x: Tensor, key_end: Tensor | None) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(heads)  # (n, T, H, C)
        k = self.k_proj(x).view(heads)
        v = self.v_proj(x).view(heads)
        y = self.attention_op(q, k, v, key_end=key_end)
        return self.out_proj(y.reshape(x.shape))  # (n, T, Da)


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer: attention, then an MLP with GELU."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.self_attn = EncoderAttention(config)
        self.self_attn_layer_norm = LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = LayerNorm(config.d_model)
        self.gelu_op = ops.gelu

    def forward(self, x: Tensor, key_end: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), key_end)
        x = x + self.fc2(self.gelu_op(self.fc1(self.final_layer_norm(x))))
        if x.dtype == torch.float16:  # the published model's guard against overflow
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


def pool(x: Tensor) -> Tensor:
    """(n, T, Da) -> (n, T // 2, Da): two positions to one token; a last odd one is heard by the
    layers, then dropped."""
    # Contiguous: of anything else a Mac's GPU gives wrong means or gradients (pytorch #175190).
    x = x.transpose(1, 2).contiguous()
    return F.avg_pool1d(x, kernel_size=2, stride=2).transpose(1, 2)


class AudioEncoder(nn.Module):
    """The audio tower (`audio_tower` in the checkpoint).

    The position table is a tensor of the checkpoint, never trained and never recomputed.
    """

    def __init__(self, config: AudioConfig):
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = Embedding(config.max_source_positions, config.d_model)
        self.embed_positions.requires_grad_(False)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = LayerNorm(config.d_model)
        self.gelu_op = ops.gelu

    def forward(self, mel: Tensor, conv_frames: Tensor) -> Tensor:
        """Encode a batch of clips.

        mel          (n, M, F)  log-mels from frontend.log_mel, shorter ones padded at the right
                     with any finite value; cast to the weights' dtype
        conv_frames  (n,)  integers, frontend.clip_lengths(samples).conv_frames of each clip
        returns      (n, A, Da)  audio states, A = max(conv_frames) // 2; rows of clip i behind
                     conv_frames[i] // 2 are meaningless
        """
        longest = int(conv_frames.max())
        x = self.gelu_op(self.conv1(mel.to(self.conv1.weight.dtype)))  # (n, Da, F)
        x = self.gelu_op(self.conv2(x))[:, :, :longest].transpose(1, 2)  # (n, T, Da)
        # Row by row in memory: every sum and norm of the layers would else read it in strides.
        x = x.contiguous() + self.embed_positions.weight[:longest]
        # What is behind a shorter clip's end is computed with the batch, hidden from attention.
        ragged = bool((conv_frames != longest).any())
        key_end = conv_frames.to(x.device) if ragged else None
        for layer in self.layers:
            x = layer(x, key_end)
        return self.layer_norm(pool(x))  # (n, A, Da)
