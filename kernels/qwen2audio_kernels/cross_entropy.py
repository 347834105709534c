"""Linear layer and cross entropy in one, without the (P, V) table of logits.

    logits[p, v] = sum over d of x[p, d] weight[v, d]         rounded to x's dtype, as F.linear does
    top[p]       = max over v of logits[p, v]                 float32, as all that follows
    total[p]     = sum over v of exp(logits[p, v] - top[p])
    loss         = sum over counted p of (top[p] - logits[p, labels[p]] + log total[p]) / count

Backward, with e[p, v] = exp(logits[p, v] - top[p]) / total[p] - (v == labels[p]), zero where p is
ignored:

    dx      = e weight   * dloss / count
    dweight = e^T x      * dloss / count

Forward works on some rows at a time, with all V words: a matrix product by the library, one pass
of cross_entropy_fwd_kernel for top, total and loss and, if x wants a gradient, one of
cross_entropy_bwd_kernel that turns the logits into e in place, and e weight. Only the backward
pass makes dweight, on some words at a time, with all P rows: the logits again, e, and e^T x as
one matrix product a slice. So each element of dweight is accumulated over all rows inside one
product and rounded once, and needs no float32 buffer of (V, D). Cost in products of P x V x D: 1
forward, 2 with dx, 4 with dweight too (the plain version: 1, 2, 3); with a frozen lm_head nothing
is computed twice.

Memory beside inputs and gradients: one slice of at most SLICE_BYTES (256 MiB, or one row), against
P V (b + 8) bytes or more for the plain version in b-byte elements: at P = 2048, V = 156,032 in
bfloat16 that is 0.25 GiB against 3.

Roofline: the matrix products. The kernels read each logit once (loss), and read it and write it
once more (gradient); at b = 2 that is 6 bytes against 4 D = 16,384 floating operations a logit.

Rounding: logits and e are rounded to x's dtype between the passes, as in the plain version; e
before it is scaled by 1 / count forward, so that float16 does not lose it. The second product of
the logits, of another shape, may round otherwise than the first one, from which top and total are.
A word that has nearly all of the probability would get it wrong by that whole step, where a softmax
of one set of logits gets it right: so the winning word's logit is taken from the first product.

Limits: weight and x of one dtype; a label outside 0 .. V-1 that is not ignore_index makes the
loss NaN (raising would make the host wait for the device); differentiable once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _launch

SLICE_BYTES = 256 * 2**20
ALIGN = 128  # rows or words of a slice, where it holds so many: whole tiles of the matrix product


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr,  # (rows, V) contiguous
    labels_ptr,  # (rows,)
    top_ptr,  # (rows,) float32
    total_ptr,  # (rows,) float32
    winner_ptr,  # (rows,) int32, the word whose logit is top
    loss_ptr,  # (rows,) float32
    words,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * words
    # Every lane keeps its own maximum and sum, so that the loop holds no reduction.
    columns = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    winner = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, words, BLOCK):
        inside = start + columns < words
        logits = tl.load(logits_ptr + start + columns, mask=inside, other=-float("inf"))
        logits = logits.to(tl.float32)
        higher = tl.maximum(highest, logits)
        winner = tl.where(logits > highest, start + columns, winner)
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is NaN
        total = total * tl.exp(highest - shift) + tl.exp(logits - shift)
        highest = higher
    top = tl.max(highest, axis=0)
    winner = tl.min(tl.where(highest == top, winner, words), axis=0)
    total = tl.sum(total * tl.exp(highest - top), axis=0)
    label = tl.load(labels_ptr + row)
    known = (label >= 0) & (label < words)
    picked = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    loss = top - picked + tl.log(total)
    # Two numbers, not top + log(total): its rounding would scale every probability of the row.
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)
    tl.store(winner_ptr + row, winner)
    tl.store(loss_ptr + row, tl.where(label == ignore_index, 0.0, loss))


@triton.jit
def cross_entropy_bwd_kernel(
    logits_ptr,  # (rows, words) contiguous, from word first_word on; becomes e * scale
    labels_ptr,  # (rows,)
    top_ptr,  # (rows,) float32
    total_ptr,  # (rows,) float32
    winner_ptr,  # (rows,) int32
    scale_ptr,  # () float32
    first_word,
    words,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < words
    logits_ptr += row * words
    logits = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels_ptr + row)
    top = tl.load(top_ptr + row)
    word = first_word + columns
    logits = tl.where(word == tl.load(winner_ptr + row), top, logits)
    e = tl.exp(logits - top) / tl.load(total_ptr + row)
    e = tl.where(word == label, e - 1.0, e) * tl.load(scale_ptr)
    e = tl.where(label == ignore_index, 0.0, e)
    tl.store(logits_ptr + columns, e.to(logits_ptr.dtype.element_ty), mask=inside)


def _slice(length: int, bytes_each: int) -> int:
    """How many of `length` rows (or words) to take at a time."""
    fit = max(SLICE_BYTES // max(bytes_each, 1), 1)
    return max(min(length, fit // ALIGN * ALIGN or fit), 1)


class CrossEntropyFunction(torch.autograd.Function):
    """(x, weight, labels, ignore_index) -> loss."""

    @staticmethod
    def forward(ctx, x, weight, labels, ignore_index):
        P, V = len(x), len(weight)
        settings = _launch.settings("cross_entropy", _launch.arch(x.device))
        labels = labels.contiguous()
        one = torch.ones((), dtype=torch.float32, device=x.device)
        top, total, losses = torch.empty(3, P, dtype=torch.float32, device=x.device)
        winner = torch.empty(P, dtype=torch.int32, device=x.device)
        de = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device)
            if ctx.needs_input_grad[0]
            else None
        )
        step = _slice(P, V * x.element_size())
        for rows in (slice(start, min(start + step, P)) for start in range(0, P, step)):
            logits = x[rows] @ weight.T
            _launch.launch(
                cross_entropy_fwd_kernel,
                (len(logits),),
                logits,
                labels[rows],
                top[rows],
                total[rows],
                winner[rows],
                losses[rows],
                V,
                ignore_index,
                **settings,
            )
            if de is not None:
                seen = labels[rows], top[rows], total[rows], winner[rows]
                _to_gradient(logits, *seen, one, 0, ignore_index)
                torch.mm(logits, weight, out=de[rows])
            del logits  # before the next is made
        count = (labels != ignore_index).sum().clamp(min=1)
        ctx.save_for_backward(x, weight, labels, top, total, winner, de, count)
        ctx.ignore_index = ignore_index
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        x, weight, labels, top, total, winner, de, count = ctx.saved_tensors
        scale = (dloss / count).to(torch.float32)
        dx = None if de is None else (de.float() * scale).to(x.dtype)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        P, V = len(x), len(weight)
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        step = _slice(V, P * x.element_size())
        for start in range(0, V, step):
            words = slice(start, min(start + step, V))
            logits = x @ weight[words].T
            _to_gradient(logits, labels, top, total, winner, scale, start, ctx.ignore_index)
            torch.mm(logits.T, x, out=dweight[words])
            del logits
        return dx, dweight, None, None


def _to_gradient(
    logits: Tensor,
    labels: Tensor,
    top: Tensor,
    total: Tensor,
    winner: Tensor,
    scale: Tensor,
    first_word: int,
    ignore_index: int,
) -> None:
    """Turn logits of the words from first_word on into e * scale, in place."""
    rows, words = logits.shape
    settings = _launch.settings("cross_entropy", _launch.arch(logits.device))
    _launch.launch(
        cross_entropy_bwd_kernel,
        (rows, triton.cdiv(words, settings["BLOCK"])),
        logits,
        labels,
        top,
        total,
        winner,
        scale,
        first_word,
        words,
        ignore_index,
        **settings,
    )


def cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean negative log-likelihood of the labels under softmax(x weight^T).

    x       (P, D)   float32, float16 or bfloat16: hidden states at P positions, already shifted
                     against the labels
    weight  (V, D)   x's dtype: the lm_head's weight
    labels  (P,)     int32 or int64; positions that hold `ignore_index` do not count
    returns ()       float32; zero where every position is ignored, NaN where a label is no word
    raises  ValueError for other dtypes, shapes or devices
    """
    _launch.check_floats("cross_entropy", x=x, weight=weight)
    _launch.check_integers("cross_entropy", labels=labels)
    _launch.check_device("cross_entropy", x=x, labels=labels)
    _launch.check(
        x.dim() == 2, "cross_entropy", f"x has shape {tuple(x.shape)}, expected (positions, width)"
    )
    P, D = x.shape
    _launch.check(
        weight.dim() == 2 and weight.shape[1] == D and len(weight) > 0,
        "cross_entropy",
        f"weight has shape {tuple(weight.shape)}, expected (words, {D})",
    )
    _launch.check_shape("cross_entropy", "labels", labels, (P,), "one a row of x")
    return CrossEntropyFunction.apply(x, weight, labels, ignore_index)
