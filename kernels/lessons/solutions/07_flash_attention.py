"""Lesson 7, solved."""

import triton
import triton.language as tl


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, start_ptr, end_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, T, S, H, groups, scale,
    C: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    channels = tl.arange(0, C)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + (head // groups) * stride_kg
    v_ptr += batch * stride_vb + (head // groups) * stride_vg
    start, end = tl.load(start_ptr + batch), tl.load(end_ptr + batch)
    exists = (queries < T)[:, None]
    q = tl.load(q_ptr + queries[:, None] * stride_qt + channels[None, :], mask=exists, other=0.0)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, C), tl.float32)
    for first in range(0, S, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        readable = (keys < S)[:, None]
        k = tl.load(k_ptr + keys[:, None] * stride_ks + channels, mask=readable, other=0.0)
        v = tl.load(v_ptr + keys[:, None] * stride_vs + channels, mask=readable, other=0.0)
        visible = ((keys >= start) & (keys < end) & (keys < S))[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= queries[:, None] + S - T)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(visible, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = (batch * T + queries[:, None]) * H + head
    tl.store(y_ptr + place * C + channels[None, :], y, mask=exists)
