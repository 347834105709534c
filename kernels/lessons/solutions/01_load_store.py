"""Lesson 1, solved."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, residual_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0)
    tl.store(y_ptr + offsets, x + residual, mask=inside)
