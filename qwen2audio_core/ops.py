"""The mathematics of the model as plain functions: what every kernel is tested against.

Most functions here fill an op slot of the modules (an attribute whose name ends in `_op`); the rest
are their parts, and what kernels fuse. A faster version has the same name and signature in
qwen2audio_kernels and is put in with `backends.use`.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Whether products of a bfloat16 vector and matrix are fast on this CPU. They are where MKL has
# instructions for them; it uses Intel's alone, and but for one generation such CPUs have AMX too.
# Attention of one query in bfloat16 then takes a third (100 keys) to a fifth (1,000) of the time of
# widening them to float32, and elsewhere one to three times that time (measured).
NARROW_PRODUCTS = torch.backends.mkl.is_available() and bool(
    getattr(torch.cpu, "_is_amx_tile_supported", bool)()
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector to unit root-mean-square, then by a learned weight.

    y = weight * x / sqrt(mean(x^2) + eps)          mean over the last axis

    x        (..., D)  any float dtype; statistics are taken in float32 (float64 for float64)
    weight   (D,)
    returns  (..., D)  x's dtype; rounded once before the weight, as the published model does
    Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Shift each vector to mean zero and unit variance, then scale and shift by learned vectors.

    y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias      biased variance, last axis

    x        (..., D)
    weight, bias (D,)
    returns  (..., D)  x's dtype
    Ba et al., arXiv 1607.06450, equation 4.
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise: summed = x + residual, y = rms_norm(summed).

    x, residual (..., D), weight (D,); returns y and summed, the sum rounded to x's dtype first.
    """
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise: summed = x + residual, y = layer_norm(summed).

    x, residual (..., D), weight, bias (D,); returns y and summed, the sum rounded to x's dtype.
    """
    summed = x + residual
    return layer_norm(summed, weight, bias, eps), summed


def gelu(x: Tensor) -> Tensor:
    """Gaussian error linear unit in its exact form, y = x * (1 + erf(x / sqrt(2))) / 2.

    x (...) any float dtype; returns the same shape and dtype.
    Hendrycks and Gimpel, arXiv 1606.08415.
    """
    return F.gelu(x)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias and apply the exact gelu, y = gelu(x + bias); x (..., D), bias (D,)."""
    return gelu(x + bias)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated activation of the MLP, y = gate / (1 + exp(-gate)) * up.

    gate, up (..., D) of one dtype; returns (..., D), with silu(gate) rounded to that dtype before
    the product, as the published model does. Shazeer, arXiv 2002.05202, equation 6.
    """
    return F.silu(gate) * up


def rope_tables(
    positions: Tensor, channels: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, position * theta^(-2i / channels).

    positions  (B, T)  integers
    returns    cos, sin (B, T, C/2), computed in float32 and rounded to `dtype` before use, as the
               published model does (in bfloat16 this rounding is part of its arithmetic)
    """
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
    angles = positions[..., None].float() * (1.0 / theta**exponent)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by an angle that grows with their position.

    Channel i is paired with channel i + C/2 (halves, not neighbours):

        first'  = first  * cos - second * sin
        second' = second * cos + first  * sin

    q        (B, T, H, C)
    k        (B, T, G, C)
    cos, sin (B, T, C/2)  from rope_tables
    returns  q, k of the same shapes and dtype. Su et al., arXiv 2104.09864, section 3.4.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (B, T, 1, C/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` on N tokens, their turned keys and their values written into a cache.

    q                 (N, H, C)
    k, v              (N, G, C)
    cos, sin          (N, C/2)      from rope_tables
    k_cache, v_cache  (B, S, G, C)  changed in place; q's dtype, or int8 codes of code * scale
    rows, positions   (N,)          integers, where a token goes; no two have one place
    k_scale, v_scale  (B, S, G)     float32, changed in place, with an int8 cache; else None
    returns           q, k          turned
    """
    q, k = (turned[0] for turned in rope(q[None], k[None], cos[None], sin[None]))
    store(k, k_cache, rows, positions, k_scale)
    store(v, v_cache, rows, positions, v_scale)
    return q, k


def store(x: Tensor, cache: Tensor, rows: Any, positions: Any, scales: Tensor | None) -> None:
    """Write x (N, G, C) into a cache (B, S, G, C), as int8 codes where there are scales (B, S, G).

    rows, positions  any pair of indices that picks N places
    """
    if scales is not None:
        x, scales[rows, positions] = quantise(x)
    cache[rows, positions] = x


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., C) to int8 codes (..., C) and float32 scales (...): x = code * scale, rounded."""
    scale = x.abs().amax(-1).float() / 127
    codes = (x / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round()
    return codes.to(torch.int8), scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """Softmax attention, every step written out.

    y = softmax(q k^T / sqrt(C)) v        over the keys that a query may see

    The T queries are the last T of the S positions. Query i of row b sees key j if and only if

        key_start[b] <= j < key_end[b]   and, where `causal`,   j <= i + S - T

    which covers left padding (key_start), right padding (key_end) and keys already in a cache
    (S > T). Example, causal, S = 4, T = 2, key_start = [1]:     keys  0 1 2 3
                                                        query 0        . x x .
                                                        query 1        . x x x

    q          (B, T, H, C)
    k, v       (B, S, G, C)   G divides H; query head h reads key head h // (H / G)
    key_start  (B,) integers or None for 0
    key_end    (B,) integers or None for S
    returns    (B, T, H, C)   q's dtype; softmax in float32 (float64 for float64); zeros where a
               query sees no key
    Vaswani et al., arXiv 1706.03762, section 3.2.1; grouped heads, arXiv 2305.13245.
    """
    return attend(attention_weights(q, k, causal, key_start, key_end), v)


def attention_weights(
    q: Tensor,
    k: Tensor,
    causal: bool = False,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """The first half of `attention`: how much each query reads from each key, (B, H, T, S).

    softmax(q k^T / sqrt(C)) over the visible keys, in q's dtype; rows sum to 1, or are 0 where a
    query sees no key. Arguments as in `attention`.
    """
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthc,bshc->bhts", q, keys) * q.shape[-1] ** -0.5  # (B, H, T, S)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    visible = visible_keys(q.shape[1], k.shape[1], causal, key_start, key_end, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, dim=-1).nan_to_num(0.0).to(q.dtype)


def attend(weights: Tensor, v: Tensor) -> Tensor:
    """The second half of `attention`: weights (B, H, T, S) on v (B, S, G, C), to (B, T, H, C)."""
    values = v.repeat_interleave(weights.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshc->bthc", weights, values)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """The same function as `attention`, through PyTorch's fused kernels. Shapes as there."""
    T, S = q.shape[1], k.shape[1]
    # PyTorch's is_causal aligns the first query with the first key, so it serves only T == S.
    plain = key_start is None and key_end is None and (not causal or T == 1 or T == S)
    visible = None if plain else visible_keys(T, S, causal, key_start, key_end, q.device)
    y = fused_attention(q, k, v, visible, is_causal=plain and causal and T > 1)
    if key_start is not None or key_end is not None:
        # A fused kernel may return anything, even NaN, for a query that sees no key.
        assert visible is not None
        y = y.masked_fill(~visible.any(-1).transpose(1, 2)[..., None], 0.0)
    return y


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """PyTorch's scaled_dot_product_attention on our layout of axes.

    q (B, T, H, C), k and v (B, S, G, C), visible (B, 1, T, S) or None; returns (B, T, H, C).
    A single query on a CPU runs in float32 at least, but in bfloat16 with NARROW_PRODUCTS.
    """
    if on_mps(q):
        return _attention_on_mps(q, k, v, visible, is_causal)
    dtype = q.dtype
    if (
        q.shape[1] == 1
        and q.device.type == "cpu"
        and not (dtype == torch.bfloat16 and NARROW_PRODUCTS)
    ):
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        is_causal=is_causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2).to(dtype)


def on_mps(x: Tensor) -> bool:
    """Whether it lies on a Mac's GPU: on none of the devices that the model is at home on."""
    return x.device.type not in ("cpu", "cuda", "meta")


def _attention_on_mps(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool
) -> Tensor:
    """Row by row, and the mask written out. There torch up to 2.12 lets a causal query of half
    precision see what comes (pytorch #195910), takes the wrong keys where a batch's lie transposed
    and there are up to 8 queries (#181133), and a mask's first row for all (#184180)."""
    if is_causal:
        visible = visible_keys(q.shape[1], k.shape[1], True, None, None, q.device)
    rows = []
    for i in range(len(q)):
        mask = None if visible is None else visible[min(i, len(visible) - 1)][None]
        y = F.scaled_dot_product_attention(
            q[i, None].transpose(1, 2),
            k[i, None].transpose(1, 2),
            v[i, None].transpose(1, 2),
            attn_mask=mask,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        rows.append(y.transpose(1, 2))
    return torch.cat(rows)


def attention_by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """The same function as `attention` in two batched products. Shapes as there.

    On a CPU its gradient takes a fraction of the fused kernel's time while T * S is small, because
    oneDNN multiplies the bfloat16 matrices; the scores (B, H, T, S) are held in memory.
    """
    B, T, H, C = q.shape
    S, G = k.shape[1], k.shape[2]
    if H != G:
        k, v = k.repeat_interleave(H // G, dim=2), v.repeat_interleave(H // G, dim=2)
    q, k, v = (x.transpose(1, 2).reshape(B * H, -1, C) for x in (q, k, v))
    scores = torch.bmm(q * C**-0.5, k.transpose(1, 2)).view(B, H, T, S)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    visible = visible_keys(T, S, causal, key_start, key_end, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if key_start is not None or key_end is not None:
        weights = weights.nan_to_num(0.0)
    weights = weights.to(v.dtype).view(B * H, T, S)
    return torch.bmm(weights, v).view(B, H, T, C).transpose(1, 2)


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = False
) -> Tensor:
    """Self-attention within each of several sequences laid end to end, without padding.

    Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] - 1; its rows see one another and no
    other row, and where `causal` none behind themselves.

    q           (N, H, C)
    k, v        (N, G, C)   G divides H; query head h reads key head h // (H / G)
    cu_seqlens  (B + 1,)    integers that rise from 0 to N; a sequence may be empty
    max_seqlen  at least the longest length; kernels size their grid by it, this version does not
    returns     (N, H, C)   q's dtype
    """
    pieces = [
        attention(q[None, a:b], k[None, a:b], v[None, a:b], causal)[0]
        for a, b in pairwise(cu_seqlens.tolist())
    ]
    return torch.cat(pieces)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_start: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row over the keys key_start[b] <= j < lengths[b] of a cache.

    q                 (B, H, C)
    k_cache, v_cache  (B, S, G, C)  q's dtype, or int8 codes of code * scale
    lengths           (B,)          filled positions of a row, the query's own among them
    key_start         (B,) or None for 0
    k_scale, v_scale  (B, S, G)     float32 with an int8 cache, else None
    returns           (B, H, C)     q's dtype; zeros where a row sees no key
    """
    if k_scale is not None and v_scale is not None:
        k_cache = (k_cache * k_scale[..., None]).to(q.dtype)
        v_cache = (v_cache * v_scale[..., None]).to(q.dtype)
    return attention(q[:, None], k_cache, v_cache, False, key_start, lengths)[:, 0]


def visible_keys(
    T: int,
    S: int,
    causal: bool,
    key_start: Tensor | None,
    key_end: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """The keys each query sees (see `attention`): bool (B or 1, 1, T or 1, S), None for all."""
    keys = torch.arange(S, device=device)
    visible = None
    if causal and T > 1:
        queries = torch.arange(S - T, S, device=device)
        visible = (keys <= queries[:, None])[None, None]
    if key_start is not None:
        after = (keys >= key_start[:, None])[:, None, None]
        visible = after if visible is None else visible & after
    if key_end is not None:
        before = (keys < key_end[:, None])[:, None, None]
        visible = before if visible is None else visible & before
    return visible


def cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean negative log-likelihood of the labels under softmax(x weight^T).

    x       (P, D)   hidden states at P positions, already shifted against the labels
    weight  (V, D)   the lm_head's weight
    labels  (P,)     integers; positions that hold `ignore_index` do not count
    returns ()       float32 (float64 for float64); zero where every position is ignored
    """
    logits = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)
