"""Softmax attention without the score matrix, forward and backward (flash attention).

    s = q k^T / sqrt(C)      where the query may see the key, else -inf
    p = exp(s - lse)         lse = log(sum over keys of exp(s)), per query
    y = p v
    backward:  dv = p^T dy      ds = p * (dy v^T - delta) / sqrt(C)      delta = sum(dy * y)
               dq = ds k        dk = ds^T q             (dk and dv summed over the heads of a group)

Forward: one program per block of queries and head walks over the keys, rescaling its sum whenever
the running maximum grows (Dao et al., arXiv 2205.14135, algorithm 1). Backward: p is made anew from
lse, once per block of queries for dq and once per block of keys for dk and dv, so that no two
programs write to one place and the gradients are deterministic (Dao, arXiv 2307.08691).

Roofline  reads q, k, v and writes y once: 2 (T H + S G) C elements; 4 T S H C operations forward
          (half of it causal), 2.5 times as many backward. Bound by arithmetic above ~200 queries.
Layout    any strides (unit stride along C, else a copy); y, dq, dk, dv contiguous; lse (H, B T).
Rounding  scores, exponentials and sums in float32; p is rounded to the inputs' dtype for the second
          product, the output once. float32 inputs are multiplied in full float32 (no TF32).
Blocks of keys are counted from a row's first visible key, so the padding on its left, other rows of
the batch, and the number of queries do not change a bit of a row's result.
Limits    C <= 128; a sequence spans fewer than 2^31 elements of q, k and v each (174,000 positions
          of a fused projection of 12,288). Keys outside [key_start, key_end) are never read.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _launch

LOG2_E = math.log2(math.e)


@triton.jit
def _extent(cu_ptr, key_start_ptr, key_end_ptr, batch, T, S):
    """Where a sequence lies: first row of y, of dk, T, S, and [start, end) of its keys."""
    if cu_ptr is not None:
        row = tl.load(cu_ptr + batch).to(tl.int64)
        length = (tl.load(cu_ptr + batch + 1) - row).to(tl.int32)
        return row, row, length, length, length * 0, length
    else:
        wide = batch.to(tl.int64)
        start = 0
        if key_start_ptr is not None:
            start = tl.maximum(tl.load(key_start_ptr + batch), 0).to(tl.int32)
        end = S
        if key_end_ptr is not None:
            end = tl.minimum(tl.load(key_end_ptr + batch), S).to(tl.int32)
        return wide * T, wide * S, T, S, start, end


@triton.jit
def _first(x_ptr, cu_ptr, batch, row, stride_batch, stride_row):
    """Pointer to the first row of sequence `batch`."""
    if cu_ptr is not None:
        return x_ptr + row * stride_row
    else:
        return x_ptr + batch.to(tl.int64) * stride_batch


@triton.jit
def _key_blocks(
    block, start, end, shift, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """`whole`, up to which the block's queries all see all keys, and `last`, where the keys end."""
    last = end
    whole = end
    if CAUSAL:
        last = tl.minimum(end, (block + 1) * BLOCK_M + shift)
        whole = tl.minimum(end, block * BLOCK_M + shift + 1)
    return start + tl.maximum(whole - start, 0) // BLOCK_N * BLOCK_N, last


@triton.jit
def _load(x_ptr, rows, channels, stride, mask, C: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a (..., C) view as (rows, channels); zeros where masked and in the padding of C."""
    pointers = x_ptr + rows[:, None] * stride + channels[None, :]
    if MASKED:
        return tl.load(pointers, mask=mask[:, None] & (channels < C)[None, :], other=0.0)
    elif channels.shape[0] != C:
        return tl.load(pointers, mask=(channels < C)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _scores(q, k, queries, keys, end, shift, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """q k^T as (queries, keys), -inf where the query may not see the key.

    The scale comes behind the mask. Before it, the compiler would fuse scale and difference into
    one instruction where nothing is masked and could not elsewhere, and the two would round apart.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        visible = (keys < end)[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= queries[:, None] + shift)
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def _attend(
    q, acc, total, top, k_ptr, v_ptr, stride_k, stride_v, queries, channels,
    first, last, end, shift, scale,
    C: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take keys [first, last) into the running maximum, sum of exponentials and sum of values.

    scale  log2(e) / sqrt(C): exponentials are of base 2
    """
    for block in range(first, last, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, keys, channels, stride_k, keys < end, C, MASKED)
        s = _scores(q, k, queries, keys, end, shift, CAUSAL, MASKED)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen no key yet
        p = tl.exp2((s - base[:, None]) * scale)  # exactly 1 for the largest
        shrink = tl.exp2((top - base) * scale)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_ptr, keys, channels, stride_v, keys < end, C, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, total, top


# Where it is not told not to, Triton compiles anew for a length of 1 and for multiples of 16: a
# server would stop at the first prompt of each kind. (The backward kernels spill without the hint.)
@triton.jit(do_not_specialize=["T", "S", "rows"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr,
    cu_ptr, key_start_ptr, key_end_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, T, S, H, rows, groups, scale,
    C: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Causal, the last block of queries sees the most keys: it starts first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    row, _, T, S, start, end = _extent(cu_ptr, key_start_ptr, key_end_ptr, batch, T, S)
    if block * BLOCK_M >= T:
        return
    shift = S - T
    q_ptr = _first(q_ptr, cu_ptr, batch, row, stride_qb, stride_qt) + head * stride_qh
    kv_head = head // groups
    k_ptr = _first(k_ptr, cu_ptr, batch, row, stride_kb, stride_ks) + kv_head * stride_kg
    v_ptr = _first(v_ptr, cu_ptr, batch, row, stride_vb, stride_vs) + kv_head * stride_vg
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_C)
    q = _load(q_ptr, queries, channels, stride_qt, queries < T, C, True)

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole, last = _key_blocks(block, start, end, shift, CAUSAL, BLOCK_M, BLOCK_N)
    acc, total, top = _attend(
        q, acc, total, top, k_ptr, v_ptr, stride_ks, stride_vs, queries, channels,
        start, whole, end, shift, scale, C, CAUSAL, False, BLOCK_N,
    )  # fmt: skip
    acc, total, top = _attend(
        q, acc, total, top, k_ptr, v_ptr, stride_ks, stride_vs, queries, channels,
        whole, last, end, shift, scale, C, CAUSAL, True, BLOCK_N,
    )  # fmt: skip

    sees = total > 0
    total = tl.where(sees, total, 1.0)
    y = acc / total[:, None]
    # Any finite lse serves a query that sees nothing: its scores are all -inf.
    lse = tl.where(sees, top * scale + tl.log2(total), 0.0)
    outputs = (row + queries)[:, None] * (H * C) + head * C + channels[None, :]
    mask = (queries < T)[:, None] & (channels < C)[None, :]
    tl.store(y_ptr + outputs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + head * rows + row + queries, lse, mask=queries < T)


@triton.jit
def attention_bwd_delta_kernel(
    y_ptr, dy_ptr, delta_ptr, rows, H, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """delta = sum over channels of dy * y, (H, rows)."""
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_C)
    y = _load(y_ptr + head * C, row, channels, H * C, row < rows, C, True).to(tl.float32)
    dy = _load(dy_ptr + head * C, row, channels, H * C, row < rows, C, True).to(tl.float32)
    tl.store(delta_ptr + head * rows + row, tl.sum(y * dy, 1), mask=row < rows)


@triton.jit
def _pull(
    q, dy, lse, delta, dq, k_ptr, v_ptr, stride_k, stride_v, queries, channels,
    first, last, end, shift, scale,
    C: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the keys [first, last) to dq, still without its factor 1 / sqrt(C)."""
    for block in range(first, last, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, keys, channels, stride_k, keys < end, C, MASKED)
        v = _load(v_ptr, keys, channels, stride_v, keys < end, C, MASKED)
        s = _scores(q, k, queries, keys, end, shift, CAUSAL, MASKED)
        p = tl.exp2(s * scale - lse[:, None])
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, dq_ptr,
    cu_ptr, key_start_ptr, key_end_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, T, S, H, rows, groups, scale, softmax_scale,
    C: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    row, _, T, S, start, end = _extent(cu_ptr, key_start_ptr, key_end_ptr, batch, T, S)
    if block * BLOCK_M >= T:
        return
    shift = S - T
    q_ptr = _first(q_ptr, cu_ptr, batch, row, stride_qb, stride_qt) + head * stride_qh
    kv_head = head // groups
    k_ptr = _first(k_ptr, cu_ptr, batch, row, stride_kb, stride_ks) + kv_head * stride_kg
    v_ptr = _first(v_ptr, cu_ptr, batch, row, stride_vb, stride_vs) + kv_head * stride_vg
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_C)
    q = _load(q_ptr, queries, channels, stride_qt, queries < T, C, True)
    dy = _load(dy_ptr + row * (H * C) + head * C, queries, channels, H * C, queries < T, C, True)
    statistics = head * rows + row + queries
    lse = tl.load(lse_ptr + statistics, mask=queries < T, other=0.0)
    delta = tl.load(delta_ptr + statistics, mask=queries < T, other=0.0)

    whole, last = _key_blocks(block, start, end, shift, CAUSAL, BLOCK_M, BLOCK_N)
    dq = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dq = _pull(
        q, dy, lse, delta, dq, k_ptr, v_ptr, stride_ks, stride_vs, queries, channels,
        start, whole, end, shift, scale, C, CAUSAL, False, BLOCK_N,
    )  # fmt: skip
    dq = _pull(
        q, dy, lse, delta, dq, k_ptr, v_ptr, stride_ks, stride_vs, queries, channels,
        whole, last, end, shift, scale, C, CAUSAL, True, BLOCK_N,
    )  # fmt: skip
    outputs = (row + queries)[:, None] * (H * C) + head * C + channels[None, :]
    mask = (queries < T)[:, None] & (channels < C)[None, :]
    tl.store(dq_ptr + outputs, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_ptr, key_start_ptr, key_end_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, T, S, G, rows, groups, scale, softmax_scale,
    C: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, key_row, T, S, start, end = _extent(cu_ptr, key_start_ptr, key_end_ptr, batch, T, S)
    if block * BLOCK_N >= S:
        return
    shift = S - T
    q_ptr = _first(q_ptr, cu_ptr, batch, row, stride_qb, stride_qt)
    k_ptr = _first(k_ptr, cu_ptr, batch, row, stride_kb, stride_ks) + kv_head * stride_kg
    v_ptr = _first(v_ptr, cu_ptr, batch, row, stride_vb, stride_vs) + kv_head * stride_vg
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_C)
    visible = (keys >= start) & (keys < end)
    k = _load(k_ptr, keys, channels, stride_ks, visible, C, True)
    v = _load(v_ptr, keys, channels, stride_vs, visible, C, True)

    first = 0
    if CAUSAL:
        first = tl.maximum(block * BLOCK_N - shift, 0)
    last = T  # no query sees a block that lies outside the visible keys
    if (block + 1) * BLOCK_N <= start or block * BLOCK_N >= end:
        last = first
    width = G * groups * C
    dk = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for head in range(kv_head * groups, (kv_head + 1) * groups):
        queries_ptr, gradients_ptr = q_ptr + head * stride_qh, dy_ptr + row * width + head * C
        statistics = head * rows + row
        for query_block in range(first, last, BLOCK_M):
            queries = query_block + tl.arange(0, BLOCK_M)
            q = _load(queries_ptr, queries, channels, stride_qt, queries < T, C, True)
            dy = _load(gradients_ptr, queries, channels, width, queries < T, C, True)
            lse = tl.load(lse_ptr + statistics + queries, mask=queries < T, other=0.0)
            delta = tl.load(delta_ptr + statistics + queries, mask=queries < T, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (keys, queries)
            seen = visible[:, None]
            if CAUSAL:
                seen = seen & (keys[:, None] <= queries[None, :] + shift)
            p = tl.where(seen, tl.exp2(s * scale - lse[None, :]), 0.0)
            dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    outputs = (key_row + keys)[:, None] * (G * C) + kv_head * C + channels[None, :]
    mask = (keys < S)[:, None] & (channels < C)[None, :]
    tl.store(dk_ptr + outputs, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + outputs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


class _Ranges(NamedTuple):
    """Which queries and keys belong together, for a padded batch and a packed one alike."""

    T: int  # of the longest sequence
    S: int
    B: int
    rows: int  # queries in all
    tensors: tuple[Tensor | None, Tensor | None, Tensor | None]  # cu_seqlens, key_start, key_end


def _strides(*tensors: Tensor) -> list[int]:
    """Strides (batch, row, head) of each; a packed tensor has no batch."""
    return [stride for x in tensors for stride in ((0,) * (4 - x.ndim) + x.stride()[:-1])]


def _options(kernel: str, q: Tensor) -> dict[str, int]:
    """Block sizes by channels, and apart for float32, which no matrix instruction multiplies."""
    block = max(16, triton.next_power_of_2(q.shape[-1]))
    key = f"{kernel}_{max(block, 64)}{'_float32' if q.dtype == torch.float32 else ''}"
    return {"BLOCK_C": block, **_launch.settings(key, _launch.arch(q.device))}


class AttentionFunction(torch.autograd.Function):
    """(q, k, v, ranges, causal) -> y, padded (B, T, H, C) or packed (N, H, C)."""

    @staticmethod
    def forward(ctx, q, k, v, ranges, causal):
        # The kernels walk along channels with unit stride; every other stride is free.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        H, C = q.shape[-2:]
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(H, ranges.rows, dtype=torch.float32, device=q.device)
        options = _options("attention_fwd", q)
        grid = (triton.cdiv(ranges.T, options["BLOCK_M"]), H, ranges.B)
        _launch.launch(
            attention_fwd_kernel, grid, q, k, v, y, lse, *ranges.tensors, *_strides(q, k, v),
            ranges.T, ranges.S, H, ranges.rows, H // k.shape[-2], LOG2_E * C**-0.5,
            C=C, CAUSAL=causal, **options,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, y, lse, *ranges.tensors)
        ctx.ranges, ctx.causal = ranges._replace(tensors=(None, None, None)), causal
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, y, lse, *tensors = ctx.saved_tensors
        T, S, B, rows, _ = ctx.ranges
        dy = dy.contiguous()
        (H, C), G = q.shape[-2:], k.shape[-2]
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty_like(lse)
        block = max(16, triton.next_power_of_2(C))
        _launch.launch(
            attention_bwd_delta_kernel, (triton.cdiv(rows, 32), H),
            y, dy, delta, rows, H, C=C, BLOCK_M=32, BLOCK_C=block, num_warps=4,
        )  # fmt: skip
        sizes = (rows, H // G, LOG2_E * C**-0.5, C**-0.5)
        options = _options("attention_bwd_dq", q)
        _launch.launch(
            attention_bwd_dq_kernel, (triton.cdiv(T, options["BLOCK_M"]), H, B),
            q, k, v, dy, lse, delta, dq, *tensors, *_strides(q, k, v), T, S, H, *sizes,
            C=C, CAUSAL=ctx.causal, **options,
        )  # fmt: skip
        options = _options("attention_bwd_dkv", q)
        _launch.launch(
            attention_bwd_dkv_kernel, (triton.cdiv(S, options["BLOCK_N"]), G, B),
            q, k, v, dy, lse, delta, dk, dv, *tensors, *_strides(q, k, v), T, S, G, *sizes,
            C=C, CAUSAL=ctx.causal, **options,
        )  # fmt: skip
        return dq, dk, dv, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the keys that each query may see.

    y = softmax(q k^T / sqrt(C)) v

    The T queries are the last T of the S positions. Query i of row b sees key j if and only if

        key_start[b] <= j < key_end[b]   and, where `causal`,   j <= i + S - T

    q          (B, T, H, C)   float32, float16 or bfloat16; C <= 128
    k, v       (B, S, G, C)   q's dtype; G divides H; query head h reads key head h // (H / G)
    key_start  (B,) integers or None for 0
    key_end    (B,) integers or None for S
    returns    (B, T, H, C)   q's dtype; zeros where a query sees no key. Differentiable in q, k, v
    raises     ValueError for other dtypes, shapes or devices
    Vaswani et al., arXiv 1706.03762, section 3.2.1; grouped heads, arXiv 2305.13245.
    """
    op = "attention"
    _launch.check(q.ndim == 4, op, f"q has shape {tuple(q.shape)}, expected (B, T, H, C)")
    _launch.check(k.ndim == 4, op, f"k has shape {tuple(k.shape)}, expected (B, S, G, C)")
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    _launch.check_shape(op, "k", k, (B, S, k.shape[2], q.shape[3]), "B and C of q")
    _check(op, q, k, v)
    ranges = {}
    for name, tensor in (("key_start", key_start), ("key_end", key_end)):
        if tensor is not None:
            _launch.check_shape(op, name, tensor, (B,), "one a row of q")
            _launch.check_integers(op, **{name: tensor})
            _launch.check_device(op, q=q, **{name: tensor})
            tensor = tensor.contiguous()
        ranges[name] = tensor
    tensors = (None, ranges["key_start"], ranges["key_end"])
    return AttentionFunction.apply(q, k, v, _Ranges(T, S, B, B * T, tensors), causal)


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = False
) -> Tensor:
    """Self-attention within each of several sequences laid end to end, without padding.

    Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] - 1; its rows see one another and no
    other row, and where `causal` none behind themselves.

    q           (N, H, C)   float32, float16 or bfloat16; C <= 128
    k, v        (N, G, C)   q's dtype; G divides H; query head h reads key head h // (H / G)
    cu_seqlens  (B + 1,)    integers that rise from 0 to N, on q's device; a sequence may be empty
    max_seqlen  at least the longest sequence's length. Not checked on a GPU, which would have to
                wait for cu_seqlens: rows of a longer sequence behind it are left unwritten.
    returns     (N, H, C)   q's dtype. Differentiable in q, k, v
    raises      ValueError for other dtypes, shapes or devices
    """
    op = "attention_varlen"
    _launch.check(q.ndim == 3, op, f"q has shape {tuple(q.shape)}, expected (N, H, C)")
    _launch.check(k.ndim == 3, op, f"k has shape {tuple(k.shape)}, expected (N, G, C)")
    _launch.check_shape(op, "k", k, (q.shape[0], k.shape[1], q.shape[2]), "N and C of q")
    _check(op, q, k, v)
    shape = f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (B + 1,) with B >= 1"
    _launch.check(cu_seqlens.ndim == 1 and len(cu_seqlens) > 1, op, shape)
    _launch.check_integers(op, cu_seqlens=cu_seqlens)
    _launch.check_device(op, q=q, cu_seqlens=cu_seqlens)
    tensors = (cu_seqlens.contiguous(), None, None)
    B, rows = len(cu_seqlens) - 1, q.shape[0]
    ranges = _Ranges(max_seqlen, max_seqlen, B, rows, tensors)
    return AttentionFunction.apply(q, k, v, ranges, causal)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    _launch.check_shape(op, "v", v, tuple(k.shape), "the shape of k")
    H, G, C = q.shape[-2], k.shape[-2], q.shape[-1]
    _launch.check(G > 0 and H % G == 0, op, f"{H} query heads are not a multiple of {G} key heads")
    _launch.check(0 < C <= 128, op, f"{C} channels a head; the kernel holds up to 128")
    _launch.check_floats(op, q=q, k=k, v=v)
