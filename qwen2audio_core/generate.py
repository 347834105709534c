"""Prompts to answers, one token at a time. Simple and readable: what any faster way must equal."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from qwen2audio_core.cache import KVCache
from qwen2audio_core.chat import Batch, room
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.reuse import Read, shared
from qwen2audio_core.sampling import (
    NOT_FINITE,
    Likelihood,
    Settings,
    check_seed,
    check_whole,
    choose,
    log_probabilities,
    seeded,
)

TOGETHER = 256  # tokens of answers that `likelihoods` reads at once: 160 MB of logits in float32


@dataclass
class Answer:
    """The tokens of one answer. The end token is among them when the model wrote it."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = (
        ""  # "stop": an end token or the caller; "length": out of tokens; "": running
    )
    logprobs: list[Likelihood] = field(default_factory=list)  # of each id, where asked for


class Generation:
    """A batch of prompts being answered, one token per running row and step.

        run = Generation(model, batch, settings)
        while run.running:
            for row, token in run.step(): ...

    answers  how many for each prompt; rows of prompt i are i * answers ... (i + 1) * answers - 1.
             The prompt and its clips are read once.
    seed     for sampling; None draws from PyTorch's global generator
    logprobs also write down each id's Likelihood, with so many alternatives; None does not
    after    the run of one conversation, for one that may be its next turn: what both prompts begin
             with is not read again, and `reused` says how many ids that are. The model must be what
             it was then, see reuse.Fingerprint. A run that is over gives its cache away here
    seconds  how long it took so far: {"encode", "prefill", "decode"}
    """

    def __init__(
        self,
        model: Qwen2Audio,
        batch: Batch,
        settings: Settings,
        answers: int = 1,
        seed: int | None = None,
        logprobs: int | None = None,
        after: "Generation | None" = None,
    ):
        answers = check_whole("answers", answers, 1)
        seed = check_seed(seed)
        words = model.config.text.vocab_size
        if logprobs is not None:
            logprobs = check_whole("logprobs", logprobs, 0, words)
        self.model = model
        self.settings = settings
        self.logprobs = logprobs
        weight = model.language_model.model.embed_tokens.weight  # the head's may be codes
        self.device = device = weight.device
        self.generator = None if seed is None else seeded(device, seed)
        batch = batch.to(device)
        ids, mask = batch.ids, batch.attention_mask
        longest = int(mask.sum(-1).max())
        left = room(longest, model.config.text.max_position_embeddings)
        self.budget = min(settings.max_new_tokens, left)
        cache = KVCache(
            model.config.text, ids.shape[0], ids.shape[1] + self.budget - 1, device, weight.dtype
        )
        self.cache = cache
        self.prompt = Read(ids[0].tolist(), batch.mel, batch.conv_frames)  # of a lone row
        self.reused, heard = 0, 0  # ids that are in the cache already, and clips among them
        if after is not None and after.cache.length and len(after.history) == len(ids) == 1:
            self.reused, heard = shared(after.prompt, self.prompt, model.config.audio_token_id)
            cache.take(after.cache, self.reused)
            if not after.running:
                after.cache.empty()
        self.seconds = {"encode": 0.0, "prefill": 0.0, "decode": 0.0}
        with torch.inference_mode():
            with self._timed("encode"):
                x = model.embed(ids[:, self.reused :], *self.prompt.clips(heard))
            with self._timed("prefill"):
                padding = None if self.reused else mask
                self.logits = model.decode(x, padding, cache, last_only=True)[:, 0]
            # Padding must not count as a repetition: the row's last token stands in its place.
            self.history: torch.Tensor = torch.where(mask != 0, ids, ids[:, -1:])
            if answers > 1:
                rows = torch.arange(ids.shape[0], device=device).repeat_interleave(answers)
                cache.select(rows)
                self.logits, self.history = self.logits[rows], self.history[rows]
        self.answers = [Answer() for _ in range(len(self.logits))]
        self.written = 0

    @property
    def running(self) -> bool:
        """Whether any row still waits for a token."""
        return any(not answer.finish_reason for answer in self.answers)

    def finish(self, row: int) -> None:
        """End a row here, for the caller's own reason. The token it last got stays, and if it was
        the last one allowed, the reason is the caller's all the same."""
        self.answers[row].finish_reason = "stop"

    def step(self) -> list[tuple[int, int]]:
        """Write one token in every running row. Returns (row, id) of each."""
        with torch.inference_mode(), self._timed("decode"):
            tokens = self._next()
        news = []
        likelihoods = self._weigh(tokens)
        for row, (answer, token) in enumerate(zip(self.answers, tokens, strict=True)):
            if answer.finish_reason:
                continue
            answer.ids.append(token)
            answer.logprobs += likelihoods[row : row + 1]
            news.append((row, token))
            if token in self.settings.eos_token_ids:
                answer.finish_reason = "stop"
            elif self.written == self.budget:
                answer.finish_reason = "length"
        return news

    def _next(self) -> list[int]:
        if self.written:  # the last step's tokens are read only now: the very last ones never are
            x = self.model.language_model.model.embed_tokens(self.history[:, -1:])
            self.logits = self.model.decode(x, cache=self.cache)[:, 0]
        tokens = choose(self.logits, self.history, self.written, self.settings, self.generator)
        over = [row for row, answer in enumerate(self.answers) if answer.finish_reason]
        if over:  # they are computed along with the others, on anything, and read by nobody
            tokens[over] = self.history[over, -1]
        self.history = torch.cat((self.history, tokens[:, None]), dim=1)
        self.written += 1
        return tokens.tolist()

    def _weigh(self, tokens: list[int]) -> list[Likelihood]:
        if self.logprobs is None:
            return []
        chosen = torch.tensor(tokens, device=self.device)
        with torch.inference_mode():
            of_them, highest, ids = log_probabilities(self.logits, chosen, self.logprobs)
        rows = zip(of_them.tolist(), ids.tolist(), highest.tolist(), strict=True)
        return [Likelihood(one, list(zip(*top, strict=True))) for one, *top in rows]

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        self.seconds[stage] += time.perf_counter() - began


def generate(
    model: Qwen2Audio,
    batch: Batch,
    settings: Settings,
    answers: int = 1,
    seed: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[Answer]:
    """Answer every prompt of a batch.

    on_token  called with (row, id) for every new token; returning True ends that row
    returns   answers of prompt 0, then of prompt 1, ...; other arguments as in Generation
    """
    run = Generation(model, batch, settings, answers, seed)
    while run.running:
        for row, token in run.step():
            if on_token is not None and on_token(row, token):
                run.finish(row)
    return run.answers


def likelihoods(
    model: Qwen2Audio, batch: Batch, answers: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log p(id | prompt, ids before it) of every id of answers that might follow one prompt.

    The prompt is read once, and the answers together, as many as make TOGETHER tokens.

    batch    of one prompt
    answers  the ids of each
    errors   InputError for more than one prompt, an empty answer, one that does not fit, ids that
             are none; CheckpointError where logits are not finite
    """
    if len(batch.ids) != 1:
        raise InputError(f"answers are weighed for one prompt, this batch has {len(batch.ids)}")
    weight = model.language_model.model.embed_tokens.weight
    batch, text = batch.to(weight.device), model.config.text
    read = batch.ids.shape[1]
    left = room(read, text.max_position_embeddings)
    for i, answer in enumerate(answers):
        if not len(answer):
            raise InputError(f"answers[{i}] is empty: there is nothing to weigh")
        for token in answer:
            check_whole(f"an id of answers[{i}]", token, 0, text.vocab_size - 1)
        if len(answer) > left:
            raise InputError(
                f"answers[{i}] has {len(answer)} tokens, behind a prompt of {read} more than the"
                f" model's context holds: {text.max_position_embeddings}"
            )
    prompt = KVCache(text, 1, read, weight.device, weight.dtype)
    found: list[list[float]] = []
    with torch.inference_mode():
        x = model.embed(batch.ids, batch.mel, batch.conv_frames)
        first = model.decode(x, cache=prompt, last_only=True)[:, 0]  # (1, V)
        for some in _together(answers):
            most = max(map(len, some))
            ids = torch.tensor(
                [[*answer, *[0] * (most - len(answer))] for answer in some], device=weight.device
            )
            weights = [log_probabilities(first.expand(len(some), -1), ids[:, 0], 0)[0][:, None]]
            if most > 1:  # what stands behind a shorter answer is read by nobody
                cache = KVCache(text, len(some), read + most - 1, weight.device, weight.dtype)
                cache.take(prompt, read)
                x = model.language_model.model.embed_tokens(ids[:, :-1])
                logits = model.decode(x, cache=cache).flatten(0, 1)
                rest = log_probabilities(logits, ids[:, 1:].flatten(), 0)[0]
                weights.append(rest.view(len(some), -1))
            rows = torch.cat(weights, 1).tolist()
            found += [row[: len(answer)] for row, answer in zip(rows, some, strict=True)]
    if not all(math.isfinite(one) for row in found for one in row):
        raise CheckpointError(NOT_FINITE)
    return found


def _together(answers: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """In their order, as many as make TOGETHER tokens with their padding."""
    now: list[Sequence[int]] = []
    for answer in answers:
        if now and max(map(len, (*now, answer))) * (len(now) + 1) > TOGETHER:
            yield now
            now = []
        now.append(answer)
    if now:
        yield now
