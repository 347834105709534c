"""Lesson 4: strides and two-dimensional blocks. Rotary positions (RoPE).

Before attention, every query and key is turned by an angle that grows with its position. Channel i
forms a pair with channel i + C/2, and each pair is turned like a point in the plane:

    first'  = first  * cos - second * sin        first  = x[..., i]           i = 0 .. C/2 - 1
    second' = second * cos + first  * sin        second = x[..., i + C/2]     C = 128

cos and sin depend on the position t and on i, and are the same for all 32 heads: two tables of
(T, C/2). So a program takes one position and all its heads, as a block of two dimensions:

                 channel 0 ......... 63 | 64 ........ 127
       head 0    first ................ | second ........       heads[:, None] * stride_head
       head 1    first ................ | second ........     + channels[None, :]
       ...                                                      (HEADS, 1) + (1, C/2)
       head 31                                                  = (HEADS, C/2) pointers

x is not necessarily contiguous. The element (t, h, c) lies at

    x_ptr + t * stride_time + h * stride_head + c

and a kernel that takes the strides works on any view for free: here q is a third of a fused
projection (T, 3, H, C), where one position's heads are followed by its keys and values.

What is new
    a[:, None], a[None, :]    a block of n as (n, 1) or (1, n); operations stretch the ones
    x.stride(0)               in the launch: how many elements lie between x[0] and x[1]

Run it:  python kernels/lessons/04_rope.py
The finished kernel, q and k in one launch: kernels/qwen2audio_kernels/rope.py
"""

# ruff: noqa: F841  what is prepared for your part is unused until you write it

import lesson  # first: it switches Triton to its interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen2audio_core import ops


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride_time, stride_head, heads,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One position t of x (T, H, C), strided; HALF is C/2; cos, sin (T, C/2); y contiguous."""
    t = tl.program_id(0)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, HALF)
    inside = (head < heads)[:, None]
    cos = tl.load(cos_ptr + t * HALF + channel)[None, :]
    sin = tl.load(sin_ptr + t * HALF + channel)[None, :]
    target = y_ptr + (t * heads + head[:, None]) * (2 * HALF) + channel[None, :]
    # --- YOUR TURN: five lines ---------------------------------------------------------------
    # 1. source: pointers (HEADS, HALF) to the first halves of x's heads at position t
    # 2. load first there, and second HALF further, where inside
    # 3. store first' at target
    # 4. store second' at target + HALF
    pass
    # -----------------------------------------------------------------------------------------


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, C), any strides but 1 along C."""
    T, H, C = x.shape
    y = lesson.empty(T, H, C)
    rope_kernel[(T,)](
        x, cos, sin, y, x.stride(0), x.stride(1), H,
        HALF=C // 2, HEADS=triton.next_power_of_2(H),
    )  # fmt: skip
    return y


def check(solution: bool) -> None:
    def case(name: str, x: Tensor, hint: str) -> None:
        cos, sin = ops.rope_tables(torch.arange(len(x))[None], x.shape[2], 10_000.0, x.dtype)
        want, _ = ops.rope(x[None], x[None], cos, sin)
        lesson.compare(name, rope(x, cos[0], sin[0]), want[0], hint)

    case(
        "5 positions of 32 heads of 128 channels",
        torch.randn(5, 32, 128),
        "source = x_ptr + t * stride_time + head[:, None] * stride_head + channel[None, :], and the"
        " sines have opposite signs in first' and second'",
    )
    case(
        "20 heads: not a power of two",
        torch.randn(3, 20, 64),
        "head < heads masks the rows of the block that are no heads: mask=inside, other=0.0",
    )
    case(
        "q out of a fused projection",
        torch.randn(3, 3, 4, 128)[:, 0],
        "use stride_time and stride_head for x; only y is contiguous",
    )
    case(
        "heads before positions in memory",
        torch.randn(4, 3, 128).transpose(0, 1),
        "use stride_time and stride_head for x; only y is contiguous",
    )


if __name__ == "__main__":
    lesson.main(globals())
