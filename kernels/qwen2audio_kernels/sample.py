"""Logits to the next token of every row, without leaving the device and without sorting.

    s = logits; of ids seen before, s / penalty where s > 0 and s * penalty where s < 0
    s = s / temperature
    keep the top_k highest; of those, the most likely whose probabilities sum up to top_p
    token = first id whose sum of probabilities over the kept ids up to it exceeds a uniform number

The kept ids are always those with s >= t for some t, and both rules ask for the same: the highest t
with weight(s >= t) >= target. For top-k an id weighs 1 and the target is k, for top-p it weighs
exp(s) and the target is p times the sum. One program per row finds t by bisection. Every pass also
finds the logits next above and below the middle, so t ends as one of the row's logits, exactly.

Ties      Of equal logits all are kept or none: with top-k as in the plain version; with top-p the
          plain version cuts through equal logits in whatever order its sort gave them. Greedy takes
          the lowest id. A sum within float32 rounding of top_p may fall either way.
Roofline  passes: V b bytes of logits each, which stay in the GPU's cache. Greedy takes one pass,
          sampling some 20 (the logarithm of the row's range over the gap at t, for each rule).
Layout    unit stride along V. Arithmetic in float32 with exact division, for any dtype of logits.
A row uses nothing but its own row and numbers: its token does not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch


@triton.jit
def _scores(logits_ptr, seen_ptr, ids, V, penalty, temperature):
    """Scores of `ids` in float32, the same bits in every pass; -inf beyond the vocabulary."""
    s = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    if seen_ptr is not None:
        seen = tl.load(seen_ptr + ids, mask=ids < V, other=0) != 0
        s = tl.where(seen, tl.where(s < 0, s * penalty, tl.div_rn(s, penalty)), s)
    return tl.div_rn(s, temperature)


@triton.jit
def _weights(s, top, floor, MASS: tl.constexpr):
    """exp(s - top), or 1, where s >= floor; else 0."""
    if MASS:
        return tl.where(s >= floor, tl.exp(s - top), 0.0)
    else:
        return tl.where(s >= floor, 1.0, 0.0)


@triton.jit
def _threshold(
    logits_ptr, seen_ptr, V, penalty, temperature, low, top, target,
    MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest score t from low to top with weight(s >= t) >= target; low if there is none."""
    high = top
    while low < high:  # both are scores of the row, and t is one of those between them
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        weight = low * 0
        above, below = high, low
        for first in range(0, V, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            s = _scores(logits_ptr, seen_ptr, ids, V, penalty, temperature)
            weight += tl.sum(_weights(s, top, middle, MASS), 0)
            above = tl.minimum(above, tl.min(tl.where(s >= middle, s, float("inf")), 0))
            below = tl.maximum(below, tl.max(tl.where(s < middle, s, float("-inf")), 0))
        enough = weight >= target
        low = tl.where(enough, above, low)
        high = tl.where(enough, high, below)
    return low


@triton.jit
def sample_kernel(
    logits_ptr,  # (B, V)
    uniform_ptr,  # (B,)
    seen_ptr,  # (B, V) bytes, or None
    temperature_ptr, top_k_ptr, top_p_ptr, penalty_ptr,  # (B,)
    token_ptr,  # (B,) int64
    V, stride_l, stride_s,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_l
    if seen_ptr is not None:
        seen_ptr += row * stride_s
    penalty = tl.load(penalty_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    divisor = tl.where(temperature > 0, temperature, 1.0)

    top = tl.full((), float("-inf"), tl.float32)
    floor = tl.full((), float("inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    for first in range(0, V, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        s = _scores(logits_ptr, seen_ptr, ids, V, penalty, divisor)
        higher = tl.max(s, 0)
        lowest_id = tl.min(tl.where(s == higher, ids, V), 0)
        token = tl.where(higher > top, lowest_id, token)
        top = tl.maximum(top, higher)
        floor = tl.minimum(floor, tl.min(tl.where(s > float("-inf"), s, float("inf")), 0))

    if temperature > 0:
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < V):
            floor = _threshold(
                logits_ptr, seen_ptr, V, penalty, divisor, floor, top, top_k.to(tl.float32),
                False, BLOCK,
            )  # fmt: skip
        top_p = tl.load(top_p_ptr + row)
        total = top * 0
        for first in range(0, V, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            s = _scores(logits_ptr, seen_ptr, ids, V, penalty, divisor)
            total += tl.sum(_weights(s, top, floor, True), 0)
        if top_p < 1:
            floor = _threshold(
                logits_ptr, seen_ptr, V, penalty, divisor, floor, top, top_p * total, True, BLOCK
            )  # fmt: skip
            total = top * 0
            for first in range(0, V, BLOCK):
                ids = first + tl.arange(0, BLOCK)
                s = _scores(logits_ptr, seen_ptr, ids, V, penalty, divisor)
                total += tl.sum(_weights(s, top, floor, True), 0)

        goal = tl.load(uniform_ptr + row) * total
        before = top * 0
        chosen = token * 0 + V
        for first in range(0, V, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            s = _scores(logits_ptr, seen_ptr, ids, V, penalty, divisor)
            weights = _weights(s, top, floor, True)
            reached = (before + tl.cumsum(weights, 0) > goal) & (weights > 0)
            chosen = tl.minimum(chosen, tl.min(tl.where(reached, ids, V), 0))
            # Where rounding keeps the sum from reaching the goal, the last kept id is drawn.
            last = tl.max(tl.where(weights > 0, ids, -1), 0)
            token = tl.where(last >= 0, last, token)
            before += tl.sum(weights, 0)
        token = tl.where(chosen < V, chosen, token)
    tl.store(token_ptr + row, token.to(tl.int64))


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    penalty: Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """Draw the next token of every row, each row with its own settings.

    logits       (B, V)  float32, float16 or bfloat16, finite or -inf, at least one finite a row
    uniform      (B,)    float32 in [0, 1): the only randomness
    temperature  (B,)    float32; 0 or less is greedy, after the penalty, ignoring top_k and top_p
    top_k        (B,)    int32; 0 or less keeps all
    top_p        (B,)    float32; 1 or more keeps all
    penalty      (B,)    float32, above 0; 1 changes nothing
    seen         (B, V)  bool, the ids that the penalty is for; None for none
    returns      (B,)    int64 ids
    raises       ValueError for other dtypes, shapes or devices
    The settings are tensors so that one recorded CUDA graph serves all requests.
    """
    op = "sample"
    shape = f"logits has shape {tuple(logits.shape)}, expected (B, V)"
    _launch.check(logits.ndim == 2 and logits.shape[1] > 0, op, shape)
    _launch.check_floats(op, logits=logits)
    numbers = {
        "uniform": (uniform, torch.float32),
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "penalty": (penalty, torch.float32),
    }
    B, V = logits.shape
    for name, (x, dtype) in numbers.items():
        _launch.check_shape(op, name, x, (B,), "one a row of logits")
        _launch.check(x.dtype == dtype, op, f"{name} is {x.dtype}, expected {dtype}")
        _launch.check_device(op, logits=logits, **{name: x})
    if seen is not None:
        _launch.check_shape(op, "seen", seen, (B, V), "the shape of logits")
        _launch.check(seen.dtype == torch.bool, op, f"seen is {seen.dtype}, expected torch.bool")
        _launch.check_device(op, logits=logits, seen=seen)
        seen = _launch.rows(seen).view(torch.uint8)
    logits = _launch.rows(logits.detach())
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    _launch.launch(
        sample_kernel, (B,), logits, uniform.contiguous(), seen,
        *(x.contiguous() for x in (temperature, top_k, top_p, penalty)), token,
        V, logits.stride(0), 0 if seen is None else seen.stride(0),
        **_launch.settings(op, _launch.arch(logits.device)),
    )  # fmt: skip
    return token
