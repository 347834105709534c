"""Logits to the next token of every row, without leaving the device and without sorting.

    s = logits; of ids seen before, s / penalty where s > 0 and s * penalty where s < 0
    s = s / temperature
    keep the top_k highest; of those, the most likely whose probabilities sum up to top_p
    token = first id whose sum of probabilities over the kept ids up to it exceeds a uniform number

The kept ids are always those with s >= t for some t, and both rules ask for the same: the highest t
with weight(s >= t) >= target. For top-k an id weighs 1 and the target is k, for top-p it weighs
exp(s) and the target is p times the sum. One program per row finds t by bisection. Every pass also
finds the logits next above and below the middle, so t ends as one of the row's logits, exactly.

Before that, a program for every CHUNK of the vocabulary works out its scores, the highest of them
and where it is. Greedy needs no more. For top-k, the k-th highest of the chunks' highest scores is
at most t, since k scores reach it: chunks whose highest is below it hold nothing that is kept, and
all passes are over the other ones, for the published k of 20 some 20 of 305.

Ties      Of equal logits all are kept or none: with top-k as in the plain version; with top-p the
          plain version cuts through equal logits in whatever order its sort gave them. Greedy takes
          the lowest id. A sum within float32 rounding of top_p may fall either way.
Roofline  V b bytes of logits and V of `seen` once; 8 V of scores, written and read in the GPU's
          cache. Sampling then takes some 20 passes (the logarithm of the range of scores over the
          gap at t, for each rule) over the chunks that are left.
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
def _tile(
    scores_ptr, rank, taken, first, count,
    CHUNK: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Scores and ids (TILE, CHUNK) of the chunks taken, from the one of rank `first` on."""
    wanted = first + tl.arange(0, TILE)
    this = (rank[None, :] == wanted[:, None]) & taken[None, :]
    chunk = tl.sum(tl.where(this, tl.arange(0, CHUNKS)[None, :], 0), 1)
    ids = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    s = tl.load(scores_ptr + ids, mask=(wanted < count)[:, None], other=float("-inf"))
    return s, ids


@triton.jit
def _mass(
    scores_ptr, rank, taken, count, top, floor,
    CHUNK: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Sum of exp(s - top) over s >= floor."""
    total = top * 0
    for first in range(0, count, TILE):
        s, _ = _tile(scores_ptr, rank, taken, first, count, CHUNK, TILE, CHUNKS)
        total += tl.sum(tl.sum(_weights(s, top, floor, True), 1), 0)
    return total


@triton.jit
def _threshold(
    scores_ptr, rank, taken, count, low, top, target,
    MASS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The highest score t from low to top with weight(s >= t) >= target; low if there is none."""
    high = top
    while low < high:  # both are scores of the row, and t is one of those between them
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        weight = low * 0
        above, below = high, low
        for first in range(0, count, TILE):
            s, _ = _tile(scores_ptr, rank, taken, first, count, CHUNK, TILE, CHUNKS)
            weight += tl.sum(tl.sum(_weights(s, top, middle, MASS), 1), 0)
            higher = tl.where(s >= middle, s, float("inf"))
            lower = tl.where(s < middle, s, float("-inf"))
            above = tl.minimum(above, tl.min(tl.min(higher, 1), 0))
            below = tl.maximum(below, tl.max(tl.max(lower, 1), 0))
        enough = weight >= target
        low = tl.where(enough, above, low)
        high = tl.where(enough, high, below)
    return low


@triton.jit
def sample_scores_kernel(
    logits_ptr,  # (B, V)
    seen_ptr,  # (B, V) bytes, or None
    temperature_ptr, penalty_ptr,  # (B,)
    scores_ptr,  # (B, chunks, CHUNK) float32, -inf beyond the vocabulary
    highest_ptr, lowest_ptr,  # (B, chunks) float32, the lowest of those above -inf
    first_ptr,  # (B, chunks) int32, first id with the highest score
    V, stride_l, stride_s,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    _launch.begin(OVERLAP)
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    index = row * tl.num_programs(0) + chunk
    if seen_ptr is not None:
        seen_ptr += row * stride_s
    temperature = tl.load(temperature_ptr + row)
    divisor = tl.where(temperature > 0, temperature, 1.0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    penalty = tl.load(penalty_ptr + row)
    s = _scores(logits_ptr + row * stride_l, seen_ptr, ids, V, penalty, divisor)
    highest = tl.max(s, 0)
    tl.store(scores_ptr + index * CHUNK + tl.arange(0, CHUNK), s)
    tl.store(highest_ptr + index, highest)
    tl.store(lowest_ptr + index, tl.min(tl.where(s > float("-inf"), s, float("inf")), 0))
    tl.store(first_ptr + index, tl.min(tl.where(s == highest, ids, V), 0))


@triton.jit
def sample_draw_kernel(
    scores_ptr, highest_ptr, lowest_ptr, first_ptr,  # of sample_scores_kernel
    uniform_ptr, temperature_ptr, top_k_ptr, top_p_ptr,  # (B,)
    token_ptr,  # (B,) int64
    V, chunks,
    CHUNK: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    _launch.begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * chunks * CHUNK
    number = tl.arange(0, CHUNKS)
    taken = number < chunks
    highest = tl.load(highest_ptr + row * chunks + number, mask=taken, other=float("-inf"))
    first_id = tl.load(first_ptr + row * chunks + number, mask=taken, other=0)
    top = tl.max(highest, 0)
    token = tl.min(tl.where(taken & (highest == top), first_id, V), 0)

    if tl.load(temperature_ptr + row) > 0:
        lowest = tl.load(lowest_ptr + row * chunks + number, mask=taken, other=float("inf"))
        top_k = tl.load(top_k_ptr + row)
        some = (top_k > 0) & (top_k < V)
        if some:
            in_order = tl.sort(highest, descending=True)  # -inf behind the last chunk
            level = tl.max(tl.where(number == top_k - 1, in_order, float("-inf")), 0)
            taken = taken & (highest >= level)
        floor = tl.min(tl.where(taken, lowest, float("inf")), 0)
        count = tl.sum(taken.to(tl.int32), 0)
        rank = tl.cumsum(taken.to(tl.int32), 0) - 1
        if some:
            floor = _threshold(
                scores_ptr, rank, taken, count, floor, top, top_k.to(tl.float32),
                False, CHUNK, TILE, CHUNKS,
            )  # fmt: skip
        top_p = tl.load(top_p_ptr + row)
        total = _mass(scores_ptr, rank, taken, count, top, floor, CHUNK, TILE, CHUNKS)
        if top_p < 1:
            floor = _threshold(
                scores_ptr, rank, taken, count, floor, top, top_p * total,
                True, CHUNK, TILE, CHUNKS,
            )  # fmt: skip
            total = _mass(scores_ptr, rank, taken, count, top, floor, CHUNK, TILE, CHUNKS)

        goal = tl.load(uniform_ptr + row) * total
        before = top * 0
        chosen = token * 0 + V
        for first in range(0, count, TILE):
            s, ids = _tile(scores_ptr, rank, taken, first, count, CHUNK, TILE, CHUNKS)
            weights = _weights(s, top, floor, True)
            sums = tl.sum(weights, 1)
            start = before + tl.cumsum(sums, 0) - sums
            reached = (start[:, None] + tl.cumsum(weights, 1) > goal) & (weights > 0)
            chosen = tl.minimum(chosen, tl.min(tl.min(tl.where(reached, ids, V), 1), 0))
            # Where rounding keeps the sum from reaching the goal, the last kept id is drawn.
            last = tl.max(tl.max(tl.where(weights > 0, ids, -1), 1), 0)
            token = tl.where(last >= 0, last, token)
            before += tl.sum(sums, 0)
        token = tl.where(chosen < V, chosen, token)
    token = tl.where(token < V, token, 0)  # of a row without a number, and so without a highest one
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
    temperature, penalty = temperature.contiguous(), penalty.contiguous()
    options = dict(_launch.settings(op, _launch.arch(logits.device)))
    chunk, tile = options["CHUNK"], options.pop("TILE")
    chunks = triton.cdiv(V, chunk)
    scores = torch.empty(B, chunks, chunk, dtype=torch.float32, device=logits.device)
    extremes = torch.empty(2, B, chunks, dtype=torch.float32, device=logits.device)
    first = torch.empty(B, chunks, dtype=torch.int32, device=logits.device)
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    _launch.launch(
        sample_scores_kernel, (chunks, B), logits, seen, temperature, penalty,
        scores, *extremes, first,
        V, logits.stride(0), 0 if seen is None else seen.stride(0), CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    _launch.launch(
        sample_draw_kernel, (B,), scores, *extremes, first,
        uniform.contiguous(), temperature, top_k.contiguous(), top_p.contiguous(), token,
        V, chunks, TILE=tile, CHUNKS=triton.next_power_of_2(chunks), **options,
    )  # fmt: skip
    return token
