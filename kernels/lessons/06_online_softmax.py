"""Lesson 6: the online softmax. The loss over 156,032 words.

The loss of one position is the logarithm of the softmax's denominator, less the right word's logit:

    loss = log(sum over v of exp(logits[v])) - logits[label]

exp(100) is infinite in float32, so everyone takes the maximum out first:

    top = max(logits)        log(sum exp(logits)) = top + log(sum exp(logits - top))

which reads the logits twice, once for the maximum and once for the sum. A row of 156,032 logits
does not fit a program, so twice means twice from memory. The online softmax reads them once. It
walks over blocks and keeps two numbers, the maximum so far and the sum so far relative to it:

    blocks      [ 2  5  1 ]      [ 4  3  0 ]      [ 9  2  6 ]
    top              5                5                9
    total       e-3 + e0 + e-4   + e-1 + e-2 + e-5     total * e(5 - 9) + e0 + e-7 + e-3
                                                               ^ everything so far was counted
                                                                 relative to 5: shrink it

    higher = max(top, max(block))
    total  = total * exp(top - higher) + sum(exp(block - higher))
    top    = higher

This rescaling is the heart of flash attention (lesson 7) and of split-KV decoding (lesson 8).

One trap: -inf - -inf is NaN. Where a block and all before it hold only -inf (forbidden words), the
maximum is -inf. Take the exponentials relative to 0 there: exp(-inf - 0) = 0 is what is wanted.

What is new
    tl.max(block, axis=0), tl.maximum(a, b)     within a block, and of two
    tl.where(condition, a, b)
    tl.load(..., other=-float("inf"))           the padding that changes no maximum and no sum

Run it:  python kernels/lessons/06_online_softmax.py
The finished kernel, with the matrix product before it: kernels/qwen2audio_kernels/cross_entropy.py
"""

# ruff: noqa: F841  what is prepared for your part is unused until you write it

import lesson  # first: it switches Triton to its interpreter
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def loss_kernel(logits_ptr, labels_ptr, loss_ptr, words, BLOCK: tl.constexpr):
    """The loss of one row of logits (R, words)."""
    row = tl.program_id(0)
    logits_ptr += row * words
    top = tl.full((), -float("inf"), tl.float32)  # the maximum of the blocks so far
    total = tl.zeros((), tl.float32)  # the sum of exp(logit - top) over them
    for first in range(0, words, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns, mask=columns < words, other=-float("inf"))
        # --- YOUR TURN: four lines -------------------------------------------------------------
        # 1. higher: the maximum of top and of this block
        # 2. base:   higher, but 0.0 where higher is -inf
        # 3. total:  shrunk by exp(top - base), plus this block's sum of exp(logits - base)
        # 4. top:    higher
        pass
        # -------------------------------------------------------------------------------------
    label = tl.load(labels_ptr + row)
    picked = tl.load(logits_ptr + label)
    loss = tl.where(total > 0, top + tl.log(total) - picked, 0.0)
    tl.store(loss_ptr + row, loss)


def losses(logits: Tensor, labels: Tensor, block: int = 1024) -> Tensor:
    """logits (R, V) contiguous, labels (R,)."""
    loss = lesson.empty(len(logits))
    loss_kernel[(len(logits),)](logits, labels, loss, logits.shape[1], BLOCK=block)
    return loss


def check(solution: bool) -> None:
    def case(name: str, logits: Tensor, hint: str) -> None:
        labels = torch.arange(len(logits)) + logits.shape[1] - 5
        want = F.cross_entropy(logits.double(), labels, reduction="none").float()
        lesson.compare(name, losses(logits, labels), want, hint)

    case(
        "one block of 1,000 words",
        torch.randn(2, 1000),
        "higher = tl.maximum(top, tl.max(logits, axis=0)), and the sum is of exp(logits - base)",
    )
    case(
        "logits that rise from block to block",
        torch.linspace(-40, 40, 5000).repeat(2, 1),
        "what was summed before was relative to the old top: total * tl.exp(top - base)",
    )
    case(
        "logits that fall from block to block",
        torch.linspace(200, -200, 5000).repeat(2, 1),
        "higher is no less than top: without that, exp(top - base) grows until it is infinite",
    )
    case(
        "logits around 1,000",
        1000 + torch.randn(2, 3000),
        "exp(1000) is infinite: only differences to the maximum may be exponentiated",
    )
    case(
        "logits around -1,000",
        -1000 + torch.randn(2, 3000),
        "exp(-1000) is zero: base is the maximum where that is negative, too",
    )
    forbidden = -1000 + torch.randn(2, 3000)
    forbidden[:, :2000] = -float("inf")
    case(
        "the first 2,000 words forbidden (-inf), the others around -1,000",
        forbidden,
        "-inf - -inf is NaN: base = tl.where(higher == -float('inf'), 0.0, higher); top stays -inf",
    )
    case("the model's 156,032 words", 3 * torch.randn(1, 156_032), "the same loop, 153 times")


if __name__ == "__main__":
    lesson.main(globals())
