"""Lesson 5: a tiled matrix product. The linear layer.

Nearly all of the model's arithmetic is y = x w^T: x holds M positions of K numbers, w the weight
(N, K) as nn.Linear keeps it.

    y[m, n] = sum over k of x[m, k] * w[n, k]

In the encoder's first MLP layer M = 1,500 frames, K = 1,280, N = 5,120: 20 GFLOP. Made one number
at a time, each y would read 2 * 1,280 numbers. Made in tiles, each number read serves a whole row
or column of the tile:

                      k ->                       one program makes one tile of y
             +------+------+------+
      x   m  |######|      |      |  BLOCK_M     step 0: tile of x  @  (tile of w)^T
             +------+------+------+              step 1: one BLOCK_K further, added on top
                                                 ...
             +------+------+------+              last:   store
      w   n  |######|      |      |  BLOCK_N
             +------+------+------+
             BLOCK_K ---->

With tiles of 128 x 128 a number from memory takes part in 128 products instead of one. That is the
difference between a program that waits for memory and one that keeps the matrix units busy. (The
library's product, which the model uses for large M, adds many refinements to this same plan.)

The sum is kept in float32 however short the inputs' type is: bfloat16 has 8 bits, and adding 1,280
products in it would lose most of the answer.

What is new
    tl.dot(a, b, acc)     acc + a @ b, blocks (M, K) @ (K, N), on the matrix units of a GPU.
                          float32 is rounded to 10 bits there unless input_precision="ieee"
    tl.trans(a)           transposed
    for k in range(0, K, BLOCK_K):       an ordinary loop; k is a number of this program

Run it:  python kernels/lessons/05_matmul.py
The finished kernel, for few rows and quantised weights: kernels/qwen2audio_kernels/linear.py
"""

# ruff: noqa: F841  what is prepared for your part is unused until you write it

import lesson  # first: it switches Triton to its interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y (M, N) = x (M, K) @ w (N, K)^T, all contiguous."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        # --- YOUR TURN: three statements -------------------------------------------------------
        # 1. x: the tile (BLOCK_M, BLOCK_K); row m starts at x_ptr + m * K. Zeros outside of M, K
        # 2. w: the tile (BLOCK_N, BLOCK_K); row n starts at w_ptr + n * K. Zeros outside of N, K
        # 3. acc: plus x @ w^T, with input_precision="ieee"
        pass
        # -------------------------------------------------------------------------------------
    inside = (rows < M)[:, None] & (outputs < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + outputs[None, :], acc, mask=inside)


def linear(x: Tensor, w: Tensor, block: int = 64) -> Tensor:
    (M, K), N = x.shape, len(w)
    y = lesson.empty(M, N)
    grid = (triton.cdiv(M, block), triton.cdiv(N, block))
    linear_kernel[grid](x, w, y, M, N, K, BLOCK_M=block, BLOCK_N=block, BLOCK_K=block)
    return y


def check(solution: bool) -> None:
    for M, N, K, hint in (
        (
            64,
            128,
            128,
            "x_ptr + rows[:, None] * K + inner[None, :], and w the same with outputs; then"
            ' acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")',
        ),
        (50, 70, 128, "mask rows beyond M in x and outputs beyond N in w"),
        (50, 70, 100, "mask inner < K in both tiles, other=0.0: behind a row lies the next one"),
    ):
        x, w = torch.randn(M, K), torch.randn(N, K)
        case = f"{M} x {K} times {K} x {N}"
        lesson.compare(case, linear(x, w), (x.double() @ w.double().T).float(), hint)


if __name__ == "__main__":
    lesson.main(globals())
