"""Lesson 1: load, store and masks. The sum of the residual stream.

A GPU kernel is a small program that is started many times. Every copy (a "program") does the same
to another block of the data; which block, it learns from its number, tl.program_id(0).

Every layer of the model adds its result to the residual stream:

    y[i] = x[i] + residual[i]

In the audio encoder a frame is 1,280 numbers wide. With blocks of 1,024, three frames (3,840
numbers) take four programs, and the last one reaches beyond the end:

    program 0         program 1         program 2         program 3
    0 ........ 1023 | 1024 ..... 2047 | 2048 ..... 3071 | 3072 ... 3839 xxxxx
                                                                        ^ 256 places that do not
                                                                          exist: masked out
A block's size is a power of two and known when the kernel is compiled (tl.constexpr); the number of
elements is known only at run time. The mask bridges the two.

What you need
    tl.arange(0, BLOCK)                       the numbers 0, 1, ... BLOCK - 1, as one block
    tl.load(pointers, mask=m, other=0.0)      a block of values; 0.0 where m is False
    tl.store(pointers, values, mask=m)        writes only where m is True
    x_ptr + offsets                           a block of pointers: x_ptr points at x[0]
    a < b,  a + b                             work on whole blocks, element by element

The cost: two numbers read and one written for one addition. Nothing on a GPU is idle longer than
its adders here: such a kernel is as fast as the memory, and no faster.

Run it:  python kernels/lessons/01_load_store.py
"""

import lesson  # first: it switches Triton to its interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_kernel(x_ptr, residual_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    """y = x + residual for the elements of this program's block."""
    # --- YOUR TURN: four lines ---------------------------------------------------------------
    # 1. offsets: the BLOCK places of this program. Program 2 has 2 * BLOCK, 2 * BLOCK + 1, ...
    # 2. inside:  True for the places that exist, those below `elements`
    # 3. load x and residual at the offsets, where inside, and add them
    # 4. store the sum at the offsets of y, where inside
    pass
    # -----------------------------------------------------------------------------------------


def add(x: Tensor, residual: Tensor, block: int = 1024) -> Tensor:
    """The launch: how many programs (the grid), and what each of them is given."""
    y = lesson.empty(*x.shape)
    programs = triton.cdiv(x.numel(), block)  # division that rounds up
    add_kernel[(programs,)](x, residual, y, x.numel(), BLOCK=block)
    return y


def check(solution: bool) -> None:
    for frames, hint in (
        (
            4,
            "offsets start at tl.program_id(0) * BLOCK, otherwise all programs do the same block;"
            " inside is offsets < elements",
        ),
        (3, "the last block is not full: mask both loads and the store with offsets < elements"),
    ):
        x, residual = torch.randn(frames, 1280), torch.randn(frames, 1280)
        case = f"{frames} frames of 1,280 = {frames * 1280 / 1024:g} blocks"
        lesson.compare(case, add(x, residual), x + residual, hint)
    x, residual = torch.randn(5), torch.randn(5)
    lesson.compare("5 elements", add(x, residual), x + residual, "the same mask, in block 0")


if __name__ == "__main__":
    lesson.main(globals())
