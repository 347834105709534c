"""Lesson 7: flash attention. Lessons 5 and 6 in one kernel.

    s = q k^T / sqrt(C)         (T, S) scores, -inf where a query may not see a key
    y = softmax(s) v            (T, C), for every head

Written so, the scores go through memory. In the encoder, 30 s are 1,500 frames and 20 heads: 45
million scores a layer, 90 MB in bfloat16, written and read several times. q, k, v and y together
are 15 MB. Flash attention never stores a score: a program keeps BLOCK_M queries and walks over the
keys in tiles, with lesson 6's rescaling, on a whole block of queries at once:

                 keys ->
                 +-------+-------+-------+
      queries    | s = q |       |       |     per query:  top    (BLOCK_M,)
      BLOCK_M    | @ k^T |  -->  |  -->  |                 total  (BLOCK_M,)
                 +-------+-------+-------+                 acc    (BLOCK_M, C) = sum of p * v
                    | p = exp(s - top)
                    v
                 acc = acc * shrink + p @ v                y = acc / total, at the end

acc is a sum like total, with v for weights, so it is shrunk by the same factor.

Which keys a query sees comes in three masks, which the model needs: padding at the left of a row
(key_start), at its right (key_end), and, where causal, the future. The T queries are the last T of
the S positions (the earlier ones are in the cache):

    key_start <= key < key_end        and        key <= query + S - T

Grouped heads: query head h reads key head h // groups.

What is new
    tl.max(block, axis=1)     one number for every row, (BLOCK_M,)
    acc * shrink[:, None]     a factor for every row

Run it:  python kernels/lessons/07_flash_attention.py
The finished kernel, with a backward pass and packed rows: kernels/qwen2audio_kernels/attention.py
"""

# ruff: noqa: F841  what is prepared for your part is unused until you write it

import lesson  # first: it switches Triton to its interpreter
import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen2audio_core import ops


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, start_ptr, end_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg, T, S, H, groups, scale,
    C: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one row. q (B, T, H, C), k and v (B, S, G, C), strided."""
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
        # --- YOUR TURN: eight lines ------------------------------------------------------------
        # 1. s:      (BLOCK_M, BLOCK_N) = q @ k^T * scale, with input_precision="ieee"
        # 2.         -inf where not visible
        # 3. higher: for every query, the maximum of top and of its scores
        # 4. base:   higher, but 0.0 where higher is -inf
        # 5. p:      exp(s - base), with base as a column, and shrink: exp(top - base)
        # 6. total:  shrunk, plus the sum of p along the keys
        # 7. acc:    shrunk, plus p @ v, with input_precision="ieee"
        # 8. top:    higher
        pass
        # -------------------------------------------------------------------------------------
    y = acc / tl.where(total > 0, total, 1.0)[:, None]  # zeros for a query that sees no key
    place = (batch * T + queries[:, None]) * H + head
    tl.store(y_ptr + place * C + channels[None, :], y, mask=exists)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> Tensor:
    """ops.attention for float32, with the same arguments: so it fits the model's slots."""
    assert q.dtype == torch.float32, f"load the model with dtype=torch.float32, not {q.dtype}"
    B, T, H, C = q.shape
    S, G = k.shape[1:3]
    if key_start is None:
        key_start = torch.zeros(B, dtype=torch.long)
    if key_end is None:
        key_end = torch.full((B,), S)
    y = lesson.empty(B, T, H, C)
    block = 64
    attention_kernel[(triton.cdiv(T, block), H, B)](
        q, k, v, y, key_start, key_end, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        T, S, H, H // G, C**-0.5, C=C, CAUSAL=causal, BLOCK_M=block, BLOCK_N=block,
    )  # fmt: skip
    return y


def check(solution: bool) -> None:
    def case(
        name: str, T: int, S: int, H: int, G: int, C: int, hint: str,
        far: Tensor | None = None, **masks: object,
    ) -> None:  # fmt: skip
        q, k, v = torch.randn(2, T, H, C), torch.randn(2, S, G, C), torch.randn(2, S, G, C)
        if far is not None:  # one number for each key, which is added to all of its scores
            q[..., 0], k[..., 0] = C**0.5, far[:, None]
        want = ops.attention(q.double(), k.double(), v.double(), **masks).float()
        limit = 1e-5 if far is None else 1e-4  # a score of 200 is itself rounded by 1e-5
        lesson.compare(name, attention(q, k, v, **masks), want, hint, limit)

    case(
        "one tile: 64 frames, the encoder's heads of 64",
        *(64, 64, 2, 2, 64),
        "s = tl.dot(q, tl.trans(k), input_precision='ieee') * scale; p = tl.exp(s - base[:, None])",
    )
    case(
        "two tiles: 128 frames",
        *(128, 128, 1, 1, 64),
        "acc and total are both shrunk by exp(top - base) before the tile is added",
    )
    case(
        "150 frames, 3 s of sound: the last tile is not full",
        *(150, 150, 1, 1, 64),
        "s = tl.where(visible, s, -float('inf')), before the maximum is taken",
    )
    case(
        "scores that rise from -200 to 200 with the keys",
        *(5, 150, 1, 1, 64),
        "exp(200) is infinite: only differences to the highest score so far are exponentiated",
        far=torch.linspace(-200, 200, 150),
    )
    case(
        "scores that fall from 200 to -200",
        *(5, 150, 1, 1, 64),
        "higher is no less than top: without that, shrink is infinite",
        far=torch.linspace(200, -200, 150),
    )
    case(
        "scores around -200",
        *(5, 150, 1, 1, 64),
        "exp(-200) is zero: base is the highest score where that is negative, too",
        far=torch.full((150,), -200.0),
    )
    case(
        "causal, the decoder's heads of 128",
        *(100, 100, 2, 2, 128),
        "s = tl.where(visible, s, -float('inf')), before the maximum is taken",
        causal=True,
    )
    case(
        "a prefix in the cache, two query heads to a key head",
        *(5, 90, 4, 2, 64),
        "nothing new for your part: visible already has it",
        causal=True,
    )
    case(
        "padding at the left, more than a tile of it, and scores around -200",
        *(150, 150, 1, 1, 64),
        "a tile without a visible key leaves higher and top at -inf, and base alone must be 0.0",
        far=torch.full((150,), -200.0),
        causal=True,
        key_start=torch.tensor([0, 80]),
    )
    case(
        "padding at the right",
        *(70, 70, 1, 1, 64),
        "nothing new for your part: visible already has it",
        key_end=torch.tensor([70, 33]),
    )


if __name__ == "__main__":
    lesson.main(globals())
