"""Attention of one query a row over a cache, the keys cut into parts of a fixed size (split-KV).

    part i:   top_i = max s      total_i = sum exp(s - top_i)      acc_i = sum exp(s - top_i) v
    y = sum_i exp(top_i - top) acc_i / sum_i exp(top_i - top) total_i      top = max_i top_i

One sequence alone has too few heads to fill a GPU, so a program takes one head and SPLIT keys, and
a second kernel joins the parts (flash-decoding). The size of a part is fixed, not their number, and
the parts are counted from a row's first key: a row's result is bit for bit the same in any batch,
at any padding and in a cache of any length. The grid covers the whole cache and
programs beyond a row's length stop at once, so a launch does not depend on the lengths and a CUDA
graph can record it.

An int8 cache holds code = round(x / scale) with one float32 scale a position and head.

Roofline  bytes: 2 C b for every visible key and head, b = 2 in bfloat16, 1 in int8 (and 8 bytes
          of scales); the parts add 8 (C + 2) / SPLIT, 1.6 % at C = 128 and SPLIT = 128. Grouped
          query heads each read their keys, all but the first from the GPU's cache.
Layout    any strides, unit stride along C; y contiguous. Arithmetic in float32.
Limits    no backward; C <= 256; a row of the cache spans fewer than 2^31 elements (524,288
          positions of 32 heads of 128).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch

LOG2_E = math.log2(math.e)


@triton.jit
def _range(lengths_ptr, key_start_ptr, row, S):
    """First and last visible key of a row."""
    start = 0
    if key_start_ptr is not None:
        start = tl.maximum(tl.load(key_start_ptr + row), 0).to(tl.int32)
    return start, tl.minimum(tl.load(lengths_ptr + row), S).to(tl.int32)


@triton.jit
def decode_attention_part_kernel(
    q_ptr,  # (B, H, C)
    k_ptr, v_ptr,  # (B, S, G, C)
    k_scale_ptr, v_scale_ptr,  # (B, S, G) or None; rows anywhere, each contiguous
    lengths_ptr, key_start_ptr,  # (B,), (B,) or None
    acc_ptr,  # (B, H, parts, C) float32
    stats_ptr,  # (B, H, parts, 2) float32: top, total
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    stride_scale, S, G, groups, scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    _launch.begin(OVERLAP)
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = _range(lengths_ptr, key_start_ptr, row, S)
    first = start + part * SPLIT
    if first >= end:
        return
    end = tl.minimum(end, first + SPLIT)
    kv_head = head // groups
    wide = row.to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    inside = channels < C
    q = tl.load(q_ptr + wide * stride_qb + head * stride_qh + channels, mask=inside, other=0.0)
    q = q.to(tl.float32) * scale
    k_ptr += wide * stride_kb + kv_head * stride_kg + channels[None, :]
    v_ptr += wide * stride_vb + kv_head * stride_vg + channels[None, :]
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for block in tl.static_range(SPLIT // BLOCK_N):
        keys = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (keys < end)[:, None] & inside[None, :]
        k = tl.load(k_ptr + keys[:, None] * stride_ks, mask=mask, other=0).to(tl.float32)
        v = tl.load(v_ptr + keys[:, None] * stride_vs, mask=mask, other=0).to(tl.float32)
        s = tl.sum(q[None, :] * k, 1)
        scales = wide * stride_scale + keys * G + kv_head
        if k_scale_ptr is not None:
            s *= tl.load(k_scale_ptr + scales, mask=keys < end, other=0.0)
        s = tl.where(keys < end, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 0))  # finite: the first key of the part is visible
        p = tl.exp2(s - higher)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 0)
        if v_scale_ptr is not None:
            p *= tl.load(v_scale_ptr + scales, mask=keys < end, other=0.0)
        acc = acc * shrink + p[:, None] * v
        top = higher
    index = (wide * tl.num_programs(0) + head) * tl.num_programs(1) + part
    tl.store(acc_ptr + index * C + channels, tl.sum(acc, 0), mask=inside)
    tl.store(stats_ptr + index * 2, top)
    tl.store(stats_ptr + index * 2 + 1, total)


@triton.jit
def decode_attention_join_kernel(
    acc_ptr, stats_ptr, lengths_ptr, key_start_ptr,
    y_ptr,  # (B, H, C)
    S, parts,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    _launch.begin(OVERLAP)
    head, row = tl.program_id(0), tl.program_id(1)
    start, end = _range(lengths_ptr, key_start_ptr, row, S)
    used = tl.maximum(end - start + SPLIT - 1, 0) // SPLIT
    channels = tl.arange(0, BLOCK_C)
    index = row.to(tl.int64) * tl.num_programs(0) + head
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    y = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, used, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        stats = stats_ptr + (index * parts + part) * 2
        tops = tl.load(stats, mask=part < used, other=float("-inf"))
        totals = tl.load(stats + 1, mask=part < used, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - higher)
        shrink = tl.exp2(top - higher)
        acc = tl.load(
            acc_ptr + (index * parts + part)[:, None] * C + channels[None, :],
            mask=(part < used)[:, None] & (channels < C)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(totals * weights, 0)
        y = y * shrink + tl.sum(acc * weights[:, None], 0)
        top = higher
    y = y / tl.where(total > 0, total, 1.0)
    tl.store(y_ptr + index * C + channels, y.to(y_ptr.dtype.element_ty), mask=channels < C)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_start: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one query a row over the keys key_start[b] <= j < lengths[b] of a cache.

    y = softmax(q k^T / sqrt(C)) v

    q          (B, H, C)     float32, float16 or bfloat16; C <= 256
    k_cache    (B, S, G, C)  q's dtype, or int8 with scales; G divides H, and query head h reads key
                             head h // (H / G). Positions out of range are never read.
    v_cache    (B, S, G, C)  as k_cache
    lengths    (B,)          integers, filled positions of each row, the query's own among them
    key_start  (B,)          integers or None for 0
    k_scale    (B, S, G)     float32, with an int8 cache: k = code * scale; None otherwise
    v_scale    (B, S, G)     the same for v
    returns    (B, H, C)     q's dtype; zeros where a row sees no key
    raises     ValueError for other dtypes, shapes or devices, and where a gradient is asked for
    """
    op = "decode_attention"
    _check(op, q, k_cache, v_cache, lengths, key_start, k_scale, v_scale)
    q, k_cache, v_cache = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache)
    )
    lengths = lengths.contiguous()
    key_start = None if key_start is None else key_start.contiguous()
    (B, H, C), (S, G) = q.shape, k_cache.shape[1:3]
    stride_scale = 0
    if k_scale is not None and v_scale is not None:
        if k_scale.stride()[1:] != (G, 1) or v_scale.stride() != k_scale.stride():
            k_scale, v_scale = k_scale.contiguous(), v_scale.contiguous()
        stride_scale = k_scale.stride(0)
    options = dict(_launch.settings(op, _launch.arch(q.device)))
    split, block = options["SPLIT"], max(16, triton.next_power_of_2(C))
    parts = triton.cdiv(S, split)
    acc = torch.empty(B, H, parts, C, dtype=torch.float32, device=q.device)
    stats = torch.empty(B, H, parts, 2, dtype=torch.float32, device=q.device)
    y = torch.empty(B, H, C, dtype=q.dtype, device=q.device)
    _launch.launch(
        decode_attention_part_kernel, (H, parts, B),
        q, k_cache, v_cache, k_scale, v_scale, lengths, key_start, acc, stats,
        *q.stride()[:-1], *k_cache.stride()[:-1], *v_cache.stride()[:-1],
        stride_scale, S, G, H // G, LOG2_E * C**-0.5, C=C, BLOCK_C=block, **options,
    )  # fmt: skip
    _launch.launch(
        decode_attention_join_kernel, (H, B),
        acc, stats, lengths, key_start, y, S, parts,
        C=C, BLOCK_C=block, BLOCK_P=16, SPLIT=split, num_warps=4,
    )  # fmt: skip
    return y


def _check(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_start: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments fit together."""
    for name, x, ndim, axes in (("q", q, 3, "(B, H, C)"), ("k_cache", k_cache, 4, "(B, S, G, C)")):
        _launch.check(x.ndim == ndim, op, f"{name} has shape {tuple(x.shape)}, expected {axes}")
    (B, H, C), (S, G) = q.shape, k_cache.shape[1:3]
    _launch.check_shape(op, "k_cache", k_cache, (B, S, G, C), "B and C of q")
    _launch.check_shape(op, "v_cache", v_cache, (B, S, G, C), "the shape of k_cache")
    _launch.check(G > 0 and H % G == 0, op, f"{H} query heads are not a multiple of {G} key heads")
    _launch.check(0 < C <= 256, op, f"{C} channels a head; the kernel holds up to 256")
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    _launch.check(not gradient, op, "has no backward; call it under torch.no_grad()")
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    given = {name: x for name, x in scales.items() if x is not None}
    if k_cache.dtype == torch.int8:
        _launch.check_floats(op, q=q)
        _launch.check(v_cache.dtype == torch.int8, op, "k_cache is int8, so v_cache must be too")
        _launch.check_scales(op, (B, S, G), **scales)
    else:
        _launch.check_floats(op, **tensors)
        for name in given:
            _launch.check(False, op, f"{name} goes with an int8 cache")
    integers = {"lengths": lengths} | ({} if key_start is None else {"key_start": key_start})
    for name, numbers in integers.items():
        _launch.check_shape(op, name, numbers, (B,), "one a row of q")
    _launch.check_integers(op, **integers)
    _launch.check_device(op, **tensors, **given, **integers)
