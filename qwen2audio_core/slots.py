"""Conversations side by side, each in a slot of its own length: prefill, and the decode step.

A slot is a row of every tensor here. Of the conversation in it,

    ids[:length]    have been read: their keys and values are in the cache
    ids[length]     was written last and is read by the next step

The step reads one id in every row, runs all layers, draws the next ids, and moves the lengths and
the stop flags on. It takes nothing from the host and gives nothing to it, so on a GPU it is one
CUDA graph for each number of rows and longest length. On a CPU the same function simply runs. A row
that has ended is computed and changes nothing.

A short prompt would keep a GPU waiting for Python too: alone it is read by a graph for the next
multiple of 64 positions. What stands behind its end is computed, and read by nobody.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qwen2audio_core import backends, ops
from qwen2audio_core.config import TextConfig
from qwen2audio_core.decoder import MLP, Attention, Decoder, DecoderLayer
from qwen2audio_core.encoder import AudioEncoder, EncoderAttention, EncoderLayer
from qwen2audio_core.errors import CheckpointError, InputError, PromptError
from qwen2audio_core.frontend import HOP_LENGTH, clip_lengths
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.packed_encoder import PackedEncoder
from qwen2audio_core.packing import Projection, projection
from qwen2audio_core.recording import UNIT, Record, Recordings, padded
from qwen2audio_core.sampling import (
    NOT_FINITE,
    Likelihood,
    Settings,
    choose,
    log_probabilities,
    seeded,
)

MAX_ENDS = 16  # end tokens a conversation can have
MAX_TOP = 20  # alternatives to a token whose log-probabilities can be asked for
ROWS = (1, 2, 4, 8, 16, 32, 64)  # of recorded steps; fewer conversations run in the next larger one
SHORTEST = 256  # positions that the shortest recorded step attends over; then every power of two
LONGEST_PROMPT = 256  # ids; of longer ones the arithmetic takes longer than Python

Saved = list[Tensor]  # what SlotCache.save returns


class SlotCache:
    """Keys and values of every layer, (layers, slots, capacity, G, C); each row has its own length.

    In int8 a vector of C channels is codes and one float32 scale, x = code * scale: half the memory
    of bfloat16 (C = 128: 132 bytes instead of 256), with errors up to 1/254 of the vector's largest
    value.
    """

    def __init__(
        self,
        config: TextConfig,
        slots: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        int8: bool = False,
    ):
        shape = (config.num_hidden_layers, slots, capacity, config.num_key_value_heads)
        self.dtype = dtype
        stored = torch.int8 if int8 else dtype
        # Positions behind a row's length are hidden, not left out: they must be finite.
        self.keys, self.values = (
            torch.zeros(*shape, config.head_dim, dtype=stored, device=device) for _ in range(2)
        )
        self.scales: tuple[Tensor, Tensor] | None = None
        if int8:
            scales = [torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2)]
            self.scales = scales[0], scales[1]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, *(self.scales or ())]

    def write(self, layer: int, rows: Any, positions: Any, k: Tensor, v: Tensor) -> None:
        """Store k, v (n, G, C) at [rows, positions], any pair of indices that picks n places."""
        for x, store, scales in zip(
            (k, v), (self.keys, self.values), self.scales or (None, None), strict=True
        ):
            ops.store(x, store[layer], rows, positions, None if scales is None else scales[layer])

    def read(self, layer: int, rows: slice, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (n, length, G, C) of a range of rows, in the model's dtype."""
        k, v = self.keys[layer, rows, :length], self.values[layer, rows, :length]
        if self.scales is None:
            return k, v
        k_scale, v_scale = (scale[layer, rows, :length, :, None] for scale in self.scales)
        return (k * k_scale).to(self.dtype), (v * v_scale).to(self.dtype)

    def bytes(self, length: int) -> int:
        """What a copy of so many positions of a row takes."""
        return sum(tensor[:, 0, :length].nbytes for tensor in self.tensors)

    def save(self, row: int, length: int) -> Saved:
        """A copy of the first `length` positions of a row."""
        return [tensor[:, row, :length].clone() for tensor in self.tensors]

    def load(self, row: int, saved: Saved, length: int) -> None:
        """Put back the first `length` positions of a copy, into any row."""
        for tensor, copy in zip(self.tensors, saved, strict=True):
            tensor[:, row, :length] = copy[:, :length]

    def move(self, source: int, target: int, length: int) -> None:
        for tensor in self.tensors:
            tensor[:, target, :length] = tensor[:, source, :length]


class Sampler(Protocol):
    """Draws the next ids. What it keeps of a row is placed and moved along with the row."""

    def place(self, row: int, ids: Tensor, settings: Settings, budget: int, seed: int) -> None: ...

    def move(self, source: int, target: int) -> None: ...

    def __call__(self, slots: "Slots", logits: Tensor, rows: slice) -> Tensor:
        """logits (n, V) of a range of rows -> ids (n,)."""


class PlainSampler:
    """sampling.choose, row by row: the tokens of generate.py, seed by seed. For the CPU.

    Rows that draw nothing and have the same settings go through it together, to the same bits.
    """

    def __init__(self, slots: int, device: torch.device):
        self._device = device
        self._rows: list[Any] = [None] * slots

    def place(self, row: int, ids: Tensor, settings: Settings, budget: int, seed: int) -> None:
        self._rows[row] = settings, seeded(self._device, seed)

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]

    def __call__(self, slots: "Slots", logits: Tensor, rows: slice) -> Tensor:
        several = slots.lengths[rows].tolist(), slots.written[rows].tolist()
        settings = self._rows[rows.start][0]
        alike = all(one[0] == settings for one in self._rows[rows])
        if alike and not settings.do_sample and min(several[1]) >= settings.min_new_tokens:
            columns = torch.arange(max(several[0]), device=self._device)
            ids = slots.ids[rows, : len(columns)]
            # What lies behind a row's end must not count: its first id stands in its place.
            history = torch.where(columns < slots.lengths[rows, None], ids, ids[:, :1])
            # Of logits that are not finite it is found below which rows have them.
            with suppress(CheckpointError):
                return choose(logits, history, min(several[1]), settings)
        counts = zip(*several, strict=True)
        tokens = []
        for i, (length, written) in enumerate(counts):
            settings, generator = self._rows[rows.start + i]
            history = slots.ids[None, rows.start + i, :length]
            try:
                token = choose(logits[i : i + 1], history, written, settings, generator)
            except CheckpointError:  # logits that are not finite: no other row's concern
                token = history[:, -1]
            tokens.append(token)
        return torch.cat(tokens)


class DeviceSampler:
    """The kernel `sample`, every row's settings and random numbers lying on the device.

    sample_op  qwen2audio_kernels.sample, or a function with its signature
    """

    def __init__(
        self, slots: int, tokens: int, vocabulary: int, device: torch.device, sample_op: Any
    ):
        self.temperature = torch.zeros(slots, device=device)
        self.top_p = torch.ones(slots, device=device)
        self.penalty = torch.ones(slots, device=device)
        self.top_k = torch.zeros(slots, dtype=torch.int32, device=device)
        self.least = torch.zeros(slots, dtype=torch.int64, device=device)  # min_new_tokens
        self.uniform = torch.zeros(slots, tokens, device=device)
        self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        self._sample_op = sample_op

    def place(self, row: int, ids: Tensor, settings: Settings, budget: int, seed: int) -> None:
        self.temperature[row] = settings.temperature if settings.do_sample else 0.0
        self.top_p[row] = settings.top_p
        self.penalty[row] = settings.repetition_penalty
        self.top_k[row] = settings.top_k
        self.least[row] = settings.min_new_tokens
        # Drawn beforehand and on the host: the same numbers on every device, beside any other row.
        draws = torch.rand(budget, generator=torch.Generator().manual_seed(seed))
        self.uniform[row, :budget] = draws.to(self.uniform.device)
        self.seen[row] = False
        self.seen[row, ids] = True

    def move(self, source: int, target: int) -> None:
        for state in vars(self).values():
            if isinstance(state, Tensor):
                state[target] = state[source]

    def __call__(self, slots: "Slots", logits: Tensor, rows: slice) -> Tensor:
        written, ends = slots.written[rows, None], slots.ends[rows]
        early = (ends >= 0) & (written < self.least[rows, None])
        places = ends.clamp(min=0)
        allowed = logits.gather(1, places).masked_fill(early, float("-inf"))
        logits = logits.scatter(1, places, allowed)
        last = slots.ids[rows].gather(1, (slots.lengths[rows, None] - 1).clamp(min=0))
        self.seen[rows].scatter_(1, last, True)
        place = written.clamp(max=self.uniform.shape[1] - 1)  # a row that has ended draws in vain
        uniform = self.uniform[rows].gather(1, place)[:, 0]
        settings = (self.temperature, self.top_k, self.top_p, self.penalty, self.seen)
        tokens: Tensor = self._sample_op(logits, uniform, *(state[rows] for state in settings))
        return tokens


@dataclass
class Layer:
    """A decoder layer as the engine runs it."""

    module: DecoderLayer
    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection


@dataclass
class Job:
    """A conversation to be read into a slot.

    ids       the prompt (T); the first `start` ids are in the slot's cache already
    clips     waveforms of the places for audio behind `start`; the first may begin before it
    budget    most ids it may write
    logprobs  whether `likelihood` will be asked for
    """

    row: int
    ids: list[int]
    clips: list[Tensor]
    settings: Settings
    budget: int
    seed: int
    start: int = 0
    logprobs: bool = False


class Slots:
    """The state of all conversations and the two ways to move it on, `prefill` and `step`.

    slots          conversations at once
    capacity       positions of each, prompt and answer
    int8_cache     see SlotCache
    kernels        the package qwen2audio_kernels for the fused step, None for plain PyTorch. Norms,
                   rotation, activation and prefill attention follow the model's own op slots.
    deterministic  a conversation's logits are the same bits alone and among any others. Prefill one
                   conversation at a time then, and no part of it from another one's cache.
    record         how to make a step, and the reading of a short prompt or of a clip, repeatable
                   without Python: `record_graph` on a GPU; None runs them each time
    """

    def __init__(
        self,
        model: Qwen2Audio,
        slots: int,
        capacity: int,
        *,
        int8_cache: bool = False,
        kernels: Any = None,
        deterministic: bool = False,
        record: Record | None = None,
    ):
        refuse_changed(model)
        text = model.config.text
        self.model = model
        self.trunk = model.language_model.model
        weight = self.trunk.embed_tokens.weight
        self.device, dtype = weight.device, weight.dtype
        device = self.device
        self.count, self.capacity = slots, capacity
        self._kernels = kernels
        self._deterministic = deterministic

        join = partial(
            projection,
            kernel=None if kernels is None else kernels.linear,
            deterministic=deterministic,
        )
        self.layers = [
            Layer(
                layer,
                join(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                join(layer.self_attn.o_proj),
                join(layer.mlp.gate_proj, layer.mlp.up_proj),
                join(layer.mlp.down_proj),
            )
            for layer in cast(list[DecoderLayer], list(self.trunk.layers))
        ]
        self.head = join(model.language_model.lm_head)
        self.encode = PackedEncoder(model, kernels, record)

        self.cache = SlotCache(text, slots, capacity, device, dtype, int8_cache)
        self._row_positions = torch.arange(capacity, device=device)
        positions = self._row_positions[None]
        cos, sin = ops.rope_tables(positions, text.head_dim, text.rope_theta, dtype)
        self._cos, self._sin = cos[0], sin[0]  # (capacity, C/2)

        def state(*shape: int, fill: int | bool = 0) -> Tensor:
            kind = torch.bool if isinstance(fill, bool) else torch.int64
            return torch.full(shape, fill, dtype=kind, device=device)

        self.ids = state(slots, capacity + 1)
        self.lengths = state(slots)
        self.written = state(slots)
        self.budget = state(slots)
        self.ends = state(slots, MAX_ENDS, fill=-1)
        self.ended = state(slots, fill=True)
        self._news = state(3, slots)  # last ids, whether their rows ended, and were finite
        self._top = min(MAX_TOP, text.vocab_size)
        # Log-probabilities of the last ids, each followed by those of the likeliest.
        self._logprobs = torch.zeros(slots, 1 + self._top, device=device)
        self._likeliest = state(slots, self._top)
        self._row_numbers = torch.arange(slots, device=device)
        self.logits: Tensor | None = None  # of the last prefill or unrecorded step, to look at
        self.failures: dict[int, Exception] = {}  # row -> why nothing could be drawn there
        self.sampler: Sampler
        if kernels is None:
            self.sampler = PlainSampler(slots, device)
        else:
            vocabulary = text.vocab_size
            self.sampler = DeviceSampler(slots, capacity, vocabulary, device, kernels.sample)
        # The lengths, and who wants log-probabilities: on the host, so that asking does not wait.
        self._known = [0] * slots
        self._weighed = [False] * slots
        self.recordings: Recordings | None = None
        if record is not None:  # and what the recorded reading of a prompt takes and gives
            self.recordings = Recordings(record)
            self._prompt = torch.zeros(
                1, LONGEST_PROMPT, text.hidden_size, dtype=dtype, device=device
            )
            self._entering = state(2)  # its row, and its last position
            self._prompt_logits = torch.zeros(1, text.vocab_size, dtype=dtype, device=device)

    # --- a conversation enters, moves and leaves --------------------------------------------------

    def prefill(self, jobs: Sequence[Job]) -> list[tuple[int, bool]]:
        """Read conversations into their slots, all ids in one pass without padding.

        returns  of each job the first id of its answer, and whether that ended it
        """
        for job in jobs:
            self._place(job)
        ids = [token for job in jobs for token in job.ids[job.start :]]
        x = self.trunk.embed_tokens(torch.tensor([ids], device=self.device))  # (1, N, D)
        self._splice(x, jobs)
        self.logits = self._read_recorded(x, jobs[0]) if self._short(jobs) else self._read(x, jobs)
        news = []
        for i, job in enumerate(jobs):
            rows = slice(job.row, job.row + 1)
            self._append(self.logits[i : i + 1], rows)
            if job.logprobs:
                self._weigh(self.logits[i : i + 1], rows)
            news += self._tell(rows)
        return news

    def _read(self, x: Tensor, jobs: Sequence[Job]) -> Tensor:
        """Logits (n, V) at the last positions of n jobs; x (1, N, D) holds their ids end to end."""
        parts, at = [], 0
        for job in jobs:
            parts.append((job, slice(at, at + len(job.ids) - job.start)))
            at = parts[-1][1].stop
        new = self._row_numbers.new_tensor
        positions = torch.cat([new(range(job.start, len(job.ids))) for job in jobs])
        rows = torch.cat([new([job.row]).expand(part.stop - part.start) for job, part in parts])
        where = self._cos[positions], self._sin[positions], rows, positions

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, _ = self._turn(layer, q[0], k[0], v[0], *where)
            y = torch.empty_like(q)
            for job, part in parts:
                keys, values = self.cache.read(layer, slice(job.row, job.row + 1), len(job.ids))
                attention_op = self.layers[layer].module.self_attn.attention_op
                y[part] = attention_op(q[None, part], keys, values, causal=True)[0]
            return y[None]

        x = self._run(x, attend, [part.stop - 1 for _, part in parts])
        logits: Tensor = self.head(self.trunk.norm(x[0]))
        return logits

    def _short(self, jobs: Sequence[Job]) -> bool:
        """Whether they are one prompt that a recorded reading takes, none of it in the cache."""
        length = len(jobs[0].ids)
        fits = length <= LONGEST_PROMPT and padded(length) <= self.capacity
        # Keys and values are taken as they are, not as the codes of an int8 cache.
        alone = len(jobs) == 1 and jobs[0].start == 0 and self.cache.scales is None
        return self.recordings is not None and fits and alone

    def _read_recorded(self, x: Tensor, job: Job) -> Tensor:
        """_read, for one prompt that is `_short`."""
        length = x.shape[1]
        count = padded(length)
        self._prompt[:, :length] = x
        self._prompt[:, length:count] = 0
        self._entering[0] = job.row
        self._entering[1] = length - 1
        assert self.recordings is not None
        self.recordings.run(("prompt", count), partial(self._read_prompt, count))
        return self._prompt_logits

    def _read_prompt(self, count: int) -> None:
        """The first `count` rows of _prompt, to _prompt_logits; none sees what is behind it."""
        row, last = self._entering.split(1)
        positions = self._row_positions[:count]
        where = self._cos[:count], self._sin[:count], row.repeat(count), positions

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = self._turn(layer, q[0], k[0], v[0], *where)
            attention_op = self.layers[layer].module.self_attn.attention_op
            return attention_op(q[None], k[None], v, causal=True)

        x = self._run(self._prompt[:, :count], attend, last)
        self._prompt_logits.copy_(self.head(self.trunk.norm(x[0])))

    def _place(self, job: Job) -> None:
        """Set a row's state for a job."""
        row, length = job.row, len(job.ids)
        ids = torch.tensor(job.ids, device=self.device)
        self.ids[row, :length] = ids
        self.lengths[row] = self._known[row] = length
        self.written[row] = 0
        self.budget[row] = job.budget
        # Filled up with one of them: to name an end twice is harmless, in any order.
        ends = list(job.settings.eos_token_ids) or [-1]
        ends += ends[:1] * (MAX_ENDS - len(ends))
        self.ends[row] = torch.tensor(ends, device=self.device)
        self.ended[row] = False
        self._weighed[row] = job.logprobs
        self.sampler.place(row, ids, job.settings, job.budget, job.seed)

    def move(self, source: int, target: int) -> None:
        """Take the conversation of one row to another; the source stays as a copy."""
        self.clear(target)  # what was there may be longer
        self.cache.move(source, target, self._known[source])
        for tensor in (self.ids, self.lengths, self.written, self.budget, self.ends, self.ended):
            tensor[target] = tensor[source]
        self._known[target], self._weighed[target] = self._known[source], self._weighed[source]
        self.sampler.move(source, target)

    def clear(self, row: int) -> None:
        """Empty a slot. Until its next prefill it may be computed along with others."""
        written = padded(self._known[row] + 1)  # by the step, and by a recorded prompt
        for tensor in self.cache.tensors:  # what it hid might not be finite
            tensor[:, row, :written] = 0
        self.failures.pop(row, None)
        self.ended[row] = True
        self.lengths[row] = self._known[row] = 0
        self._weighed[row] = False

    def warm(self) -> None:
        """Do what the first conversations would wait for, before there is one: weights are packed,
        kernels compiled, and steps, clips and short prompts of all lengths recorded, 34 graphs for
        8 slots of 2,048 positions. Only steps with log-probabilities are recorded when they are
        first asked for."""
        clip = torch.zeros(3 * HOP_LENGTH)  # one token
        settings = Settings(max_new_tokens=2, eos_token_ids=())
        ids = [self.model.config.audio_token_id, 0] * 2
        if len(ids) < self.capacity:
            self.prefill([Job(0, ids, [clip, clip], settings, 2, 0)])
            self.step(1)
            self.clear(0)
        if self.recordings is None:
            return
        self.encode.warm()
        self._entering.fill_(0)
        for count in range(UNIT, min(LONGEST_PROMPT, self.capacity) + 1, UNIT):
            if self.cache.scales is None:
                self.recordings.run(("prompt", count), partial(self._read_prompt, count))
        spans = [SHORTEST]
        while spans[-1] < self.capacity:
            spans.append(2 * spans[-1])
        for rows in sorted({min(n, self.count) for n in (*ROWS, self.count)}):
            for span in spans:
                self._replay(rows, span, False)
        for tensor in self.cache.tensors:
            tensor.zero_()

    def forget(self) -> None:
        """Record anew what is needed again: the model has changed."""
        self.logits = None  # a recording's memory
        for recordings in (self.recordings, self.encode.recordings):
            if recordings is not None:
                recordings.forget()

    # --- the step ---------------------------------------------------------------------------------

    def step(self, count: int) -> list[tuple[int, bool]]:
        """Write one id in each of the first `count` slots; returns it, and whether it was last."""
        longest = max(self._known[:count]) + 1
        weigh = any(self._weighed[:count])
        if self.recordings is not None:
            self._replay(count, longest, weigh)
        elif self._deterministic and self._kernels is None:
            # Library products add up in an order that depends on their shape: give all rows one.
            for row, length in enumerate(self._known[:count]):
                self._step(slice(row, row + 1), length + 1, True, weigh)
        else:
            even = self._kernels is None and min(self._known[:count]) + 1 == longest
            self._step(slice(0, count), longest, even, weigh)
        news = self._tell(slice(0, count))
        self._known[:count] = [length + 1 for length in self._known[:count]]
        return news

    def likelihood(self, row: int, top: int) -> Likelihood:
        """Of the id written last in a row whose job asked for it, with `top` alternatives."""
        chosen, *values = self._logprobs[row, : 1 + top].tolist()
        ids = self._likeliest[row, :top].tolist()
        return Likelihood(chosen, list(zip(ids, values, strict=True)))

    def _replay(self, count: int, longest: int, weigh: bool) -> None:
        """Run the smallest recorded step that holds so many rows and positions."""
        rows = min(next((n for n in ROWS if n >= count), self.count), self.count)
        span = SHORTEST
        while span < longest:
            span *= 2
        span = min(span, self.capacity)
        step = partial(self._step, slice(0, rows), span, False, weigh)
        assert self.recordings is not None
        self.recordings.run(("step", rows, span, weigh), step, self._as_if_ended)

    @contextmanager
    def _as_if_ended(self) -> Iterator[None]:
        """Every row as one that has ended, in which a step changes nothing."""
        ended = self.ended.clone()
        self.ended.fill_(True)
        try:
            yield
        finally:
            self.ended.copy_(ended)

    def _step(self, rows: slice, span: int, even: bool, weigh: bool = False) -> None:
        """One id in a range of rows, attending over the first `span` positions.

        even   every row's length is span - 1: one place for all, and nothing needs to be hidden
        weigh  also work out the log-probabilities
        """
        alive = ~self.ended[rows]
        lengths = self.lengths[rows] + 1  # with the id that is read now, (n,)
        where: tuple[Tensor, Tensor, Any, Any]  # see _turn
        visible = None
        if even:
            ids = self.ids[rows, span - 1 : span]
            cos, sin = (t[span - 1].expand(len(ids), -1) for t in (self._cos, self._sin))
            where = cos, sin, rows, span - 1
        else:
            positions = lengths - 1
            ids = self.ids[rows].gather(1, positions[:, None])
            where = self._cos[positions], self._sin[positions], self._row_numbers[rows], positions
            if self._kernels is None:
                visible = ops.visible_keys(1, span, False, None, lengths, self.device)
        x = self.trunk.embed_tokens(ids)  # (n, 1, D)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, _ = self._turn(layer, q[:, 0], k[:, 0], v[:, 0], *where)
            if self._kernels is None:
                keys, values = self.cache.read(layer, rows, span)
                return ops.fused_attention(q[:, None], keys, values, visible)
            scales = {}
            if self.cache.scales is not None:
                k_scale, v_scale = (scale[layer, rows, :span] for scale in self.cache.scales)
                scales = {"k_scale": k_scale, "v_scale": v_scale}
            keys = self.cache.keys[layer, rows, :span]
            values = self.cache.values[layer, rows, :span]
            y: Tensor = self._kernels.decode_attention(q, keys, values, lengths, **scales)
            return y[:, None]

        x = self._run(x, attend)
        self.lengths[rows] += alive
        self.logits = self.head(self.trunk.norm(x[:, 0]))
        self._append(self.logits, rows)
        if weigh:
            self._weigh(self.logits, rows)

    def _append(self, logits: Tensor, rows: slice) -> None:
        """Draw the next ids from logits (n, V), put them behind what was read, set the flags."""
        alive = ~self.ended[rows]
        place = self.lengths[rows, None]
        tokens = self.sampler(self, logits, rows)
        tokens = torch.where(alive, tokens, self.ids[rows].gather(1, place)[:, 0])
        self.ids[rows].scatter_(1, place, tokens[:, None])
        self.written[rows] += alive
        stop = (tokens[:, None] == self.ends[rows]).any(1)
        self.ended[rows] |= stop | (self.written[rows] >= self.budget[rows])
        self._news[0, rows] = tokens
        self._news[1, rows] = self.ended[rows].long()
        self._news[2, rows] = logits.amax(-1).isfinite().long()

    def _weigh(self, logits: Tensor, rows: slice) -> None:
        """Log-probabilities of what was drawn last from logits (n, V), for `likelihood`."""
        chosen, highest, ids = log_probabilities(logits, self._news[0, rows], self._top)
        self._logprobs[rows, 0] = chosen
        self._logprobs[rows, 1:] = highest
        self._likeliest[rows] = ids

    def _tell(self, rows: slice) -> list[tuple[int, bool]]:
        # The one place that waits for the device.
        tokens, ended, finite = self._news[:, rows].tolist()
        for row, fine in enumerate(finite, start=rows.start):
            if not fine:
                self.failures[row] = CheckpointError(NOT_FINITE)
        return [(token, bool(end)) for token, end in zip(tokens, ended, strict=True)]

    # --- the arithmetic ---------------------------------------------------------------------------

    def _run(
        self,
        x: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        last: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """All decoder layers on x (B, T, D).

        attend  turns q and k of a layer, stores k and v, and returns q's attention
        last    of the T positions those whose hidden states are wanted; None for all. What the last
                layer adds behind its attention is then computed for them alone
        """
        for i, layer in enumerate(self.layers):
            mlp = layer.module.mlp
            heads = (*x.shape[:2], -1, layer.module.self_attn.head_dim)
            qkv = layer.qkv.split(layer.module.input_layernorm(x))
            y = attend(i, *(part.view(heads) for part in qkv)).reshape(x.shape)
            if last is not None and i == len(self.layers) - 1:
                x, y = x[:, last], y[:, last]
            x = layer.o(y, residual=x)
            hidden = layer.gate_up.gated(layer.module.post_attention_layernorm(x), mlp.swiglu_op)
            x = layer.down(hidden, residual=x)
        return x

    def _turn(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Any,
        positions: Any,
    ) -> tuple[Tensor, Tensor]:
        """Turn q and k (N, .., C) by cos and sin (N, C/2), and store k and v of those N tokens.

        rows, positions  any pair of indices that picks N places. As tensors, one kernel does all of
                         it where the model's rope is that kernel
        """
        rope_op = self.layers[layer].module.self_attn.rope_op
        if self._kernels is not None and rope_op is self._kernels.rope:
            stores = [store[layer] for store in self.cache.tensors]
            caches, scales = stores[:2], stores[2:]
            turned: tuple[Tensor, Tensor] = self._kernels.rope_into_cache(
                q, k, v, cos, sin, *caches, rows, positions, *scales
            )
            return turned
        q, k = (x[0] for x in rope_op(q[None], k[None], cos[None], sin[None]))
        self.cache.write(layer, rows, positions, k, v)
        return q, k

    def _splice(self, x: Tensor, jobs: Sequence[Job]) -> None:
        """Write the clips' rows into their places in x (1, N, D), the jobs' ids end to end."""
        audio_id = self.model.config.audio_token_id
        clips = [clip for job in jobs for clip in job.clips]
        if not clips:
            return
        rows = self.encode(clips)  # (sum of K, D)
        held = [sum(clip_lengths(len(clip)).audio_tokens for clip in job.clips) for job in jobs]
        if len(rows) != sum(held):
            line = f"the clips need {len(rows)} audio tokens, the prompts hold {sum(held)}"
            raise PromptError(line)
        at = used = 0
        for job, count in zip(jobs, held, strict=True):
            places = [i for i, token in enumerate(job.ids[job.start :]) if token == audio_id]
            used += count
            # A prefix from the cache may end within the first clip: what it held of it is left out.
            x[0, [at + i for i in places]] = rows[used - len(places) : used]
            at += len(job.ids) - job.start


def refuse_changed(model: Qwen2Audio) -> None:
    """Raise InputError for what the engine would pass over.

    It runs what these modules' own `forward` does, without calling it, and its step has an
    attention of its own. Norms, projections, convolutions and the other op slots it calls.
    """
    trunk, tower = model.language_model.model, model.audio_tower
    known: list[tuple[Any, type[nn.Module]]]
    known = [(model, Qwen2Audio), (trunk, Decoder), (tower, AudioEncoder)]
    for layer in cast(list[DecoderLayer], list(trunk.layers)):
        known += [(layer, DecoderLayer), (layer.self_attn, Attention), (layer.mlp, MLP)]
    for block in cast(list[EncoderLayer], list(tower.layers)):
        known += [(block, EncoderLayer), (block.self_attn, EncoderAttention)]
    for module, kind in known:
        if "forward" in vars(module) or getattr(type(module), "forward", None) is not kind.forward:
            raise InputError(
                f"the engine does not call {type(module).__name__}.forward, which is not"
                f" {kind.__name__}'s: answer with generate.py, or change slots.py too"
            )
        if kind is Attention:
            op = getattr(module.attention_op, "plain", module.attention_op)  # watched by a probe
            if not backends.is_attention(op):
                raise InputError(
                    "the engine's step has an attention of its own and would pass over yours:"
                    " answer with generate.py, or change slots.py too"
                )
