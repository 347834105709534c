"""Lesson 8, solved."""

import triton
import triton.language as tl


@triton.jit
def part_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, acc_ptr, top_ptr, total_ptr,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    groups, scale, C: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, C)
    start, end = tl.load(start_ptr + batch), tl.load(end_ptr + batch)
    keys = start + part * SPLIT + tl.arange(0, SPLIT)
    visible = keys < end
    k_ptr += batch * stride_kb + (head // groups) * stride_kg + keys[:, None] * stride_ks
    v_ptr += batch * stride_vb + (head // groups) * stride_vg + keys[:, None] * stride_vs
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + channels)
    k = tl.load(k_ptr + channels[None, :], mask=visible[:, None], other=0.0)
    v = tl.load(v_ptr + channels[None, :], mask=visible[:, None], other=0.0)
    s = tl.sum(q[None, :] * k, axis=1) * scale
    s = tl.where(visible, s, -float("inf"))
    top = tl.max(s, axis=0)
    base = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp(s - base)
    total = tl.sum(p, axis=0)
    acc = tl.sum(p[:, None] * v, axis=0)
    index = (batch * tl.num_programs(0) + head) * tl.num_programs(1) + part
    tl.store(top_ptr + index, top)
    tl.store(total_ptr + index, total)
    tl.store(acc_ptr + index * C + channels, acc)


@triton.jit
def join_kernel(acc_ptr, top_ptr, total_ptr, y_ptr, parts, C: tl.constexpr, PARTS: tl.constexpr):
    index = tl.program_id(0)
    part = tl.arange(0, PARTS)
    channels = tl.arange(0, C)
    inside = part < parts
    top = tl.load(top_ptr + index * parts + part, mask=inside, other=-float("inf"))
    total = tl.load(total_ptr + index * parts + part, mask=inside, other=0.0)
    places = (index * parts + part[:, None]) * C + channels[None, :]
    acc = tl.load(acc_ptr + places, mask=inside[:, None], other=0.0)
    weight = tl.exp(top - tl.max(top, axis=0))
    y = tl.sum(weight[:, None] * acc, axis=0) / tl.sum(weight * total, axis=0)
    tl.store(y_ptr + index * C + channels, y)
