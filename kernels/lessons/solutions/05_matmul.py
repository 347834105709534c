"""Lesson 5, solved."""

import triton
import triton.language as tl


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        x_mask = (rows < M)[:, None] & (inner < K)[None, :]
        w_mask = (outputs < N)[:, None] & (inner < K)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + inner[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_ptr + outputs[:, None] * K + inner[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    inside = (rows < M)[:, None] & (outputs < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + outputs[None, :], acc, mask=inside)
