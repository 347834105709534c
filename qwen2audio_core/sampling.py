"""Logits to the next token: pure functions, applied in the published order."""

import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.ops import on_mps

NOT_FINITE = (
    "the model's logits are not finite, so no token can be chosen: in float16 sums overflow that"
    " bfloat16 and float32 hold, otherwise the weights are damaged"
)


@dataclass(frozen=True)
class Settings:
    """How answers are drawn and where they end. The defaults draw nothing: plain argmax.

    A checkpoint's generation_config.json brings its own (weights.read_settings): the published
    Instruct model samples at temperature 0.7, top_k 20, top_p 0.5 and penalty 1.1. Greedy decoding
    with those settings (`do_sample=False`) keeps the penalty, as the reference does.
    """

    max_new_tokens: int = 256  # counts new tokens alone, never the prompt
    min_new_tokens: int = 0  # no end token before so many
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = (151643, 151645)  # <|endoftext|>, <|im_end|>
    pad_token_id: int = 151643

    def __post_init__(self) -> None:
        # Beyond these bounds float32 scores overflow.
        whole, real = numbers.Integral, numbers.Real  # NumPy's numbers are of these kinds too
        bounds: dict[str, tuple[type, float, float, str]] = {
            "max_new_tokens": (whole, 1, 2**31, "a whole number of at least 1"),
            "min_new_tokens": (whole, 0, 2**31, "a whole number of at least 0"),
            "temperature": (real, 1e-4, 1e4, "0.0001 to 10,000 (use greedy for 0)"),
            "top_k": (whole, 0, 2**31, "a whole number of at least 0 (0 keeps all tokens)"),
            "top_p": (real, 1e-9, 1, "above 0 and at most 1"),
            "repetition_penalty": (real, 1e-2, 1e2, "0.01 to 100"),
        }
        for name, (kind, least, most, expected) in bounds.items():
            value = getattr(self, name)
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not number or not least <= value <= most:
                raise InputError(f"{name} is {value!r}, it must be {expected}")


def check_seed(seed: Any) -> int | None:
    """A seed as a plain int; InputError for what PyTorch's generators do not take."""
    if seed is None:
        return None
    if not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**63:
        raise InputError(f"seed is {seed!r:.40}, it must be a whole number of 0 to {2**63 - 1}")
    return int(seed)


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number as a plain int; InputError for anything else, and beyond the bounds."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise InputError(f"{name} is {value!r:.40}, it must be a whole number, {expected}")
    return int(value)


@dataclass(frozen=True)
class Likelihood:
    """How likely the model found a token it wrote, and which others it found likely.

    Natural logarithms of the model's own probabilities, before penalty, temperature and cuts.
    """

    logprob: float
    top: list[tuple[int, float]]  # (id, logprob) of the likeliest, falling


def choose(
    logits: Tensor,
    history: Tensor,
    new_tokens: int,
    settings: Settings,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pick the next token of every row.

    logits      (B, V)  any float dtype; all arithmetic is in float32
    history     (B, T)  ids read and written so far, without padding (repeat a real id instead)
    new_tokens  how many of them were generated
    generator   source of randomness; None for PyTorch's global one. Each call draws once.
    returns     (B,)  ids
    errors      CheckpointError where a row's logits are not finite
    """
    scores = logits.float()
    if settings.repetition_penalty != 1.0:
        scores = penalise_repetition(scores, history, settings.repetition_penalty)
    if new_tokens < settings.min_new_tokens:
        ends = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=scores.device)
        scores = scores.index_fill(-1, ends, float("-inf"))
    highest, ids = scores.max(-1)
    if not highest.isfinite().all():
        raise CheckpointError(NOT_FINITE)
    if not settings.do_sample:
        return ids
    scores = scores / settings.temperature
    if settings.top_k:
        scores = keep_top_k(scores, settings.top_k)
    if settings.top_p < 1.0:
        scores = keep_top_p(scores, settings.top_p)
    probabilities = scores.softmax(-1)
    if on_mps(scores):  # it draws ids of probability 0 (pytorch #192577)
        probabilities = probabilities.cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(scores.device)


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """What `choose` draws from on a device."""
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)


def log_probabilities(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p(token) = logit - log(sum(exp(logits))), in float32.

    logits (B, V), tokens (B,) -> (B,) of the tokens; (B, top) of the likeliest, falling; their ids
    """
    scores = logits.float()
    total = scores.logsumexp(-1, keepdim=True)
    highest, ids = scores.topk(top)
    return (scores.gather(1, tokens[:, None]) - total)[:, 0], highest - total, ids


def penalise_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Divide the positive scores of ids that occurred by the penalty, multiply the negative ones.

    scores (B, V), history (B, T) -> (B, V). However often an id occurred, it is penalised once.
    Keskar et al., arXiv 1909.05858, section 4.1, with the sign rule of the published code.
    """
    seen = scores.gather(1, history)
    return scores.scatter(1, history, torch.where(seen < 0, seen * penalty, seen / penalty))


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Send all but a row's k highest scores (B, V) to -inf; ties with the k-th stay."""
    lowest = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < lowest, float("-inf"))


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Send the least likely tokens to -inf while their total probability is at most 1 - p.

    (B, V) -> (B, V); the most likely token always stays. Holtzman et al., arXiv 1904.09751.
    """
    candidates = int((scores > float("-inf")).sum(-1).max())  # sorting 20 is cheaper than 156,032
    ranked, ids = scores.topk(candidates)
    ranked, ids = ranked.flip(-1), ids.flip(-1)  # rising
    drop = ranked.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -1] = False
    return scores.scatter(1, ids, ranked.masked_fill(drop, float("-inf")))
