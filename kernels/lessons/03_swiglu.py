"""Lesson 3: fused elementwise work. SwiGLU.

The decoder's MLP makes two vectors of 11,008 numbers, gate and up, and combines them:

    y = silu(gate) * up        silu(z) = z / (1 + exp(-z))

Written in PyTorch these are two kernels, F.silu and a product, with silu(gate) on its way through
memory between them:

    F.silu:    read gate                write silu(gate)        2 numbers moved
    product:   read silu(gate), up      write y                 3 numbers moved       5 in all
    fused:     read gate, up            write y                                       3

Neither does enough arithmetic to matter, so the fused kernel takes 3/5 of the time. "Fusing" means
only that: keep a value in the program that made it until nobody needs it any more.

Often gate and up come from one matrix product and lie side by side, (R, 2 * 11,008):

    row r:   gate[r, 0] ... gate[r, D-1]  up[r, 0] ... up[r, D-1]
             ^ fused_ptr + r * 2D         ^ D further

The grid is two-dimensional: tl.program_id(0) is the row, tl.program_id(1) the block within it
(11,008 = 10.75 blocks of 1,024, so the last one is masked).

What is new
    tl.program_id(1)      the second coordinate of this program
    tl.exp(block)

Run it:  python kernels/lessons/03_swiglu.py
The finished kernel, with a backward pass: kernels/qwen2audio_kernels/swiglu.py
"""

import lesson  # first: it switches Triton to its interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen2audio_core import ops


@triton.jit
def swiglu_kernel(fused_ptr, y_ptr, width, BLOCK: tl.constexpr):
    """fused (R, 2 * width) holds a row's gate, then its up; y (R, width)."""
    # --- YOUR TURN: seven lines --------------------------------------------------------------
    # 1. row, and columns: the places of this program's block within the row
    # 2. inside: which columns exist
    # 3. load gate; a row of `fused` is 2 * width long
    # 4. load up, `width` places behind the gate
    # 5. y = silu(gate) * up
    # 6. store y; a row of y is `width` long
    pass
    # -----------------------------------------------------------------------------------------


def swiglu(fused: Tensor, block: int = 1024) -> Tensor:
    """fused (R, 2 D), contiguous."""
    rows, width = fused.shape[0], fused.shape[1] // 2
    y = lesson.empty(rows, width)
    swiglu_kernel[(rows, triton.cdiv(width, block))](fused, y, width, BLOCK=block)
    return y


def check(solution: bool) -> None:
    def case(name: str, fused: Tensor, hint: str) -> None:
        gate, up = fused.chunk(2, dim=-1)
        lesson.compare(name, swiglu(fused), ops.swiglu(gate, up), hint)

    case(
        "one row of 2 x 1,024",
        torch.randn(1, 2048),
        "silu(gate) is gate / (1.0 + tl.exp(-gate)), and up starts `width` behind the gate",
    )
    case(
        "two rows of 2 x 11,008, the model's width",
        torch.randn(2, 22016),
        "columns start at tl.program_id(1) * BLOCK; fused rows are 2 * width apart, y's width",
    )
    case(
        "gates from -200 to 200",
        torch.linspace(-200, 200, 1000).repeat(1, 2),
        "z / (1 + exp(-z)), not z * exp(z) / (1 + exp(z)): exp(200) is infinite in float32",
    )


if __name__ == "__main__":
    lesson.main(globals())
