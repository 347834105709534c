"""Lesson 4, solved."""

import triton
import triton.language as tl


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride_time, stride_head, heads,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, HALF)
    inside = (head < heads)[:, None]
    cos = tl.load(cos_ptr + t * HALF + channel)[None, :]
    sin = tl.load(sin_ptr + t * HALF + channel)[None, :]
    target = y_ptr + (t * heads + head[:, None]) * (2 * HALF) + channel[None, :]
    source = x_ptr + t * stride_time + head[:, None] * stride_head + channel[None, :]
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    tl.store(target, first * cos - second * sin, mask=inside)
    tl.store(target + HALF, second * cos + first * sin, mask=inside)
