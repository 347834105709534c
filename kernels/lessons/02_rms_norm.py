"""Lesson 2: row reductions. RMSNorm.

Before every attention and every MLP the decoder scales each position's vector to size one:

    y[r, d] = weight[d] * x[r, d] / sqrt(mean(x[r]^2) + eps)        mean over d, D = 4,096

A reduction turns a block into one number: tl.sum(block, axis=0). The simplest plan for a
reduction along rows is one program per row, with the whole row in one block:

    program r:   x[r, 0] ... x[r, D-1] | 0 ... 0      BLOCK = the next power of two >= D
                 [---- D values -----]   [pad]        the padding must not change the sum
                           |
                     sum of squares / D  ->  one number  ->  scales the row that is still here

That is why one kernel beats five: PyTorch's x.pow(2).mean(-1) ... reads and writes the row anew at
every step, this program reads it once and writes it once. At 800 positions of 4,096 numbers of 2
bytes the row traffic is 13 MB instead of four or five times that, in one launch.

Two traps
    The padding is loaded as other=0.0, so it adds nothing to the sum. But the mean divides by D,
    the number of real values, not by BLOCK.
    Rows need not lie one behind the other: row r starts at r * stride. Here a test takes x out of a
    wider tensor, where the stride is larger than D.

What is new
    tl.sum(block, axis=0)     one number
    tl.rsqrt(number)          1 / sqrt(number)

Run it:  python kernels/lessons/02_rms_norm.py
The finished kernel, with a backward pass: kernels/qwen2audio_kernels/rms_norm.py
"""

# ruff: noqa: F841  what is prepared for your part is unused until you write it

import lesson  # first: it switches Triton to its interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen2audio_core import ops

EPS = 1e-5


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, stride, width, eps, BLOCK: tl.constexpr):
    """One row: x_ptr + row * stride is its first element; y's rows lie `width` apart."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    # --- YOUR TURN: two lines in the place of the next one -----------------------------------
    # 1. scale: 1 / sqrt(mean of x^2 + eps), one number
    # 2. y:     weight * x * scale
    y = tl.zeros((BLOCK,), tl.float32)
    # -----------------------------------------------------------------------------------------
    tl.store(y_ptr + row * width + columns, y, mask=inside)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, D) with unit stride along D."""
    rows, width = x.shape
    y = lesson.empty(rows, width)
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(rows,)](x, weight, y, x.stride(0), width, EPS, BLOCK=block)
    return y


def check(solution: bool) -> None:
    def case(name: str, x: Tensor, hint: str) -> None:
        weight = 1 + 0.1 * torch.randn(x.shape[1])
        lesson.compare(name, rms_norm(x, weight), ops.rms_norm(x, weight, EPS), hint)

    case(
        "4 rows of 4,096, the decoder's width",
        torch.randn(4, 4096),
        "scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)",
    )
    case(
        "3 rows of 1,280 in a block of 2,048",
        torch.randn(3, 1280),
        "divide the sum by width, the number of real values, not by BLOCK",
    )
    case(
        "rows of 1,280 out of rows of 1,500",
        torch.randn(3, 1500)[:, :1280],
        "the row starts at x_ptr + row * stride",
    )
    case("a row near zero", torch.randn(1, 64) * 1e-4, "eps is added under the root")


if __name__ == "__main__":
    lesson.main(globals())
