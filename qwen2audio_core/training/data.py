"""Lines of jsonl to batches of ids, labels and log-mels.

    file --scan--> index of rows --plan--> batches of row numbers --encode, collate--> Batch

Only the index is in memory: where each row lies, how many seconds and bytes of text it holds. Rows
are read when their batch is due. Which rows form which batch, and every random change to them,
follows from the seed, the epoch and the batch's number alone, so a resumed run meets the same
batches, whatever the number of processes that prepare them (to rounding: each has one thread).

The forms that a row may have stand in rows.py.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qwen2audio_core import audio, audio_files, chat, rows
from qwen2audio_core.chat import AUDIO, AUDIO_BOS, AUDIO_EOS
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import (
    MAX_SAMPLES,
    MAX_SECONDS,
    SAMPLE_RATE,
    clip_lengths,
    log_mel,
    mel_edges,
)
from qwen2audio_core.rows import Row
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.training.losses import IGNORE


@dataclass(frozen=True)
class Example:
    """One row as the model sees it."""

    ids: list[int]
    answers: list[tuple[int, int]]  # spans of ids that are trained on
    clips: list[Tensor]  # waveforms (N,)
    row: Row
    rejected: list[int] | None = None  # ids with the worse last answer
    rejected_begin: int = 0  # where that begins: a line end at its front is a token of its own


@dataclass
class Batch:
    """Examples of unequal lengths, padded at the right: then no attention needs a mask.

    With pairs, rows 0 .. B/2 - 1 end in the better answers and the other half, in the same order,
    in the worse ones. The clips are there once.
    """

    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)  ids, IGNORE where nothing is trained
    mel: Tensor | None  # (n, M, F)
    conv_frames: Tensor | None  # (n,)
    seconds: float  # of audio
    tokens: int  # without padding
    spoken: list[tuple[int, str]] = field(default_factory=list)  # clip of the batch, its transcript
    sounds: list[tuple[int, Tensor]] = field(default_factory=list)  # clip, sound of each frame
    heard: Tensor | None = None  # (P, 4)  row, position of a token, audio positions it is said in
    pairs: int = 0
    bad: list[str] = field(default_factory=list)  # rows that could not be read, file:line: why

    @property
    def supervised(self) -> int:
        """Positions that are trained on; of pairs, those of the better answers."""
        return int((self.labels[: self.pairs or None, 1:] != IGNORE).sum())

    @property
    def supervised_rows(self) -> int:
        """Rows that have such a position."""
        return int((self.labels[:, 1:] != IGNORE).any(-1).sum())

    def to(self, device: str | torch.device) -> "Batch":
        for name in ("ids", "labels", "mel", "conv_frames", "heard"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device))
        return self


# Rows to examples

Change = Callable[[Tensor], Tensor]  # waveform (N,) to another


def encode(
    row: Row, tokenizer: Tokenizer, *, limit: int | None = None, change: Change | None = None
) -> Example:
    """Tokenize a row and read its clips.

    limit   longest row in tokens, the model's context
    change  applied to every waveform
    errors  InputError, naming file and line, for a clip that cannot be read or a row too long
    """
    try:
        clips = [_clip(clip, change) for clip in row.clips]
        example = _chat(row, clips, tokenizer) if row.messages else _raw(row, clips, tokenizer)
        longest = max(len(example.ids), len(example.rejected or ()))
        if limit is not None and longest > limit:
            raise InputError(f"{longest} tokens, the model's context holds {limit}")
        return example
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error


def _raw(row: Row, clips: list[Tensor], tokenizer: Tokenizer) -> Example:
    ids: list[int] = []
    for clip in clips:
        count = clip_lengths(len(clip)).audio_tokens
        ids += [tokenizer.id_of(AUDIO_BOS), *[tokenizer.id_of(AUDIO)] * count]
        ids.append(tokenizer.id_of(AUDIO_EOS))
    places = len(ids)
    # Prompt and answer apart, as when the answer is generated behind the prompt.
    ids += tokenizer.encode(row.prompt, special=True)
    end = [tokenizer.id_of("<|endoftext|>")]
    answer = tokenizer.encode(row.answer, special=True) + end
    worse = tokenizer.encode(row.rejected or "", special=True) + end
    for name, written in (("prompt", ids[places:]), ("gt", answer), ("rejected", worse)):
        if tokenizer.id_of(AUDIO) in written:
            raise InputError(
                f"{name} holds {AUDIO}, whose places are made from the clips: take it out"
            )
    rejected = None if row.rejected is None else ids + worse
    answers = [(len(ids), len(ids + answer))]
    return Example(ids + answer, answers, clips, row, rejected, len(ids))


def _chat(row: Row, clips: list[Tensor], tokenizer: Tokenizer) -> Example:
    def written(messages: list[dict[str, str]]) -> chat.Prompt:
        items = [{"type": "audio", "audio": c, "sampling_rate": SAMPLE_RATE} for c in clips]
        turns = rows.turns(messages, items)
        return chat.encode(turns, tokenizer, add_generation_prompt=False)

    prompt, rejected, begin = written(row.messages), None, 0
    said = [i for i, turn in enumerate(row.messages) if turn["role"] == "assistant"]
    spans = zip(said, prompt.answers, strict=True)
    answers = [span for i, span in spans if i not in row.untaught]
    if row.rejected is not None:
        worse = written([*row.messages[:-1], {**row.messages[-1], "content": row.rejected}])
        begin, end = worse.answers[-1]
        rejected = worse.ids[:end]
    # Nothing behind the last <|im_end|> is ever read by the model or taught to it.
    return Example(prompt.ids[: answers[-1][1]], answers, clips, row, rejected, begin)


def _clip(source: str, change: Change | None) -> Tensor:
    waveform, name = audio.load(source), audio_files.source_name(source)
    if len(waveform) > MAX_SAMPLES:
        raise InputError(
            f"{name} is {len(waveform) / SAMPLE_RATE:.1f} s long, the model hears {MAX_SECONDS} s"
            f" at once: cut it into pieces of at most {MAX_SECONDS} s, each a row of its own"
        )
    (piece,) = audio.split(waveform, "error", name=name)
    return piece.waveform if change is None else change(piece.waveform)


# The index


class Rows:
    """The index of one or several files of rows.

    files  each a path, or "path@2.5": its rows then count 2.5 times in an epoch
    bad    one line for each row that cannot be used, "file:line: why"
    """

    def __init__(self, files: Sequence[str], count_characters: bool = False):
        pairs = [weighted(file) for file in files]
        self.files = [file for file, _ in pairs]
        self.weights = [weight for _, weight in pairs]
        self.bad: list[str] = []
        self.characters: Counter[str] = Counter()  # of the transcripts, if they are counted
        columns: list[list[float]] = [[], [], [], [], [], []]
        for number, file in enumerate(self.files):
            for line, offset, content in rows.lines(file):
                try:
                    row = rows.parsed(content, file, line)
                    length = row.seconds if row.seconds is not None else _seconds(row)
                except InputError as error:
                    self.bad.append(str(error))
                    continue
                if count_characters:
                    self.characters.update(row.transcript)
                found = (number, offset, line, length, row.size, len(content))
                for column, value in zip(columns, found, strict=True):
                    column.append(value)
        self._file = torch.tensor(columns[0], dtype=torch.int32)
        self._offset = torch.tensor(columns[1], dtype=torch.int64)
        self._line = torch.tensor(columns[2], dtype=torch.int32)
        self._size = torch.tensor(columns[5], dtype=torch.int64)
        self.seconds = torch.tensor(columns[3], dtype=torch.float32)
        # What a row costs in tokens: 25 a second, 3 bytes each, and the template's own.
        self.tokens = self.seconds * 25 + torch.tensor(columns[4], dtype=torch.float32) / 3 + 8

    def __len__(self) -> int:
        return len(self._offset)

    @property
    def about(self) -> list[int]:
        """How many rows, and of how many bytes: with other rows, very likely another pair."""
        return [len(self), int(self._size.sum())]

    def __getitem__(self, i: int) -> Row:
        file = self.files[int(self._file[i])]
        with file.open("rb") as lines:
            lines.seek(int(self._offset[i]))
            return rows.parsed(lines.read(int(self._size[i])), file, int(self._line[i]))

    def epoch(self, generator: torch.Generator) -> Tensor:
        """Numbers of the rows of one epoch, each file as often as its weight says."""
        parts = []
        for number, weight in enumerate(self.weights):
            own = (self._file == number).nonzero().flatten()
            whole = int(weight)
            rest = round((weight - whole) * len(own))
            drawn = own[torch.randperm(len(own), generator=generator)[:rest]]
            parts += [own.repeat(whole), drawn]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def weighted(file: str) -> tuple[Path, float]:
    """The path and the weight of "path" or "path@weight"; InputError where no file is there."""
    path, value = Path(file), 1.0
    before, at, weight = str(file).rpartition("@")
    if at and not path.exists():
        with suppress(ValueError):
            path, value = Path(before), float(weight)
    if not 0 < value < 1e6:
        raise InputError(f"{file}: the weight is {weight}, expected a number above 0")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    return path, value


def _seconds(row: Row) -> float:
    """Of the clips, as their files' heads say where they do: it is read when it is due."""
    try:
        return sum(
            audio_files.stated_seconds(clip) or len(audio.load(clip)) / SAMPLE_RATE
            for clip in row.clips
        )
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error


def plan(
    rows: Rows,
    epoch: int,
    *,
    batch_seconds: float,
    batch_tokens: float,
    seed: int = 0,
    short_first: int = 0,
) -> list[list[int]]:
    """One epoch's batches as row numbers, in a random order of batches.

    Rows of like length lie together: they are sorted by length with some noise, then cut where the
    padded batch would pass a limit.

    batch_seconds  of audio in a batch, padding counted
    batch_tokens   of text and audio, padding counted, as Rows.tokens estimates them
    short_first    in epoch 0, so many batches from the front are put in order of length
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    numbers = rows.epoch(generator)
    tokens = rows.tokens[numbers]
    noise = 1 + 0.1 * torch.rand(len(numbers), generator=generator)
    order = (tokens * noise).argsort()
    batches = cut(
        rows, numbers[order].tolist(), batch_seconds=batch_seconds, batch_tokens=batch_tokens
    )
    batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    if epoch == 0 and short_first:
        front = batches[:short_first]
        front.sort(key=lambda batch: float(rows.tokens[batch].mean()))
        batches[:short_first] = front
    return batches


def cut(
    rows: Rows,
    numbers: Sequence[int],
    *,
    batch_seconds: float,
    batch_tokens: float,
    most: int | None = None,
) -> list[list[int]]:
    """Rows, in their order, to batches as large as the limits of `plan` and `most` rows allow."""
    batches: list[list[int]] = []
    longest = largest = 0.0
    now: list[int] = []
    chosen = torch.tensor(numbers, dtype=torch.long)
    lengths, counts = rows.seconds[chosen].tolist(), rows.tokens[chosen].tolist()
    for number, length, count in zip(numbers, lengths, counts, strict=True):
        longest, largest = max(longest, length), max(largest, count)
        size = len(now) + 1
        if now and (
            longest * size > batch_seconds or largest * size > batch_tokens or len(now) == most
        ):
            batches.append(now)
            now, longest, largest = [], length, count
        now.append(number)
    return [*batches, now] if now else batches


class Sounds:
    """Which speech sound is heard when, as a synthesiser tells it.

    file  jsonl of {"audio": "a.wav", "phones": [[name, seconds of its start], ...], "end": seconds
          where speech ends}; a name that begins with "_" is a pause
    """

    def __init__(self, file: str | Path):
        self.names: dict[str, int] = {"": 0}  # silence
        self._of: dict[str, tuple[Tensor, Tensor, float]] = {}
        path = Path(file)
        for line, _, content in rows.lines(path):
            try:
                row = json.loads(content)
                starts = torch.tensor([float(start) for _, start in row["phones"]])
                ids = [0, *(self._number(name) for name, _ in row["phones"])]
                clip, end = rows.path_of(row["audio"], path.parent), float(row["end"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{rows.place_of(path, line)}: expected audio, phones and end ({error!r})"
                ) from error
            self._of[clip] = (starts, torch.tensor(ids), end)

    def _number(self, name: str) -> int:
        return 0 if name.startswith("_") else self.names.setdefault(name, len(self.names))

    def frames(self, clip: str, frames: int) -> Tensor | None:
        """The sound in the middle of each of the encoder's frames, 50 a second: (frames,) ids,
        0 for none. None for a clip that the file does not know."""
        if clip not in self._of:
            return None
        starts, ids, end = self._of[clip]
        middle = (torch.arange(frames) + 0.5) * 0.02
        return ids[torch.searchsorted(starts, middle, right=True)].masked_fill(middle >= end, 0)

    def when(self, clip: str, parts: Tensor) -> Tensor | None:
        """The second at which so much of the clip's speech has been said, 0 to 1, counted in
        sounds. None for a clip that the file does not know, or without speech."""
        if clip not in self._of:
            return None
        starts, ids, end = self._of[clip]
        said = ids[1:] != 0
        if not said.any():
            return None
        times = torch.cat([starts[said], torch.tensor([end])])
        place = parts * int(said.sum())
        before = place.long().clamp(max=len(times) - 2)
        return times[before] + (place - before) * (times[before + 1] - times[before])


# Random changes


@dataclass(frozen=True)
class Augment:
    """Changes to what is heard, off by default.

    speed    a clip is played faster or slower by up to this part, 0.1 for 0.9 to 1.1; it grows to
             30 s at most
    noise    part of the clips that get noise, white to brown, 5 to 30 dB below the speech
    voice    as another throat, microphone and room would have it: all frequencies of a clip are
             moved by one factor, up to this part (vocal tract length perturbation, Jaitly and
             Hinton 2013), and its tone by six normal draws from low to high, straight lines
             between them, of 40 dB times this rms: 0.1 for 0.9 to 1.1 and 4 dB
    masking  SpecAugment (arXiv 1904.08779): bands and stretches of the log-mel put to its mean
    """

    speed: float = 0.0
    noise: float = 0.0
    masking: bool = False
    voice: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("speed", 0.9), ("noise", 1), ("voice", 0.9)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}, it must be 0 to {most}")

    def waveform(self, waveform: Tensor, generator: torch.Generator) -> Tensor:
        if self.speed:
            factor = 1 + self.speed * (2 * _uniform(generator) - 1)
            # A clip may not grow beyond what the model hears.
            count = min(max(400, round(len(waveform) / factor)), MAX_SAMPLES)
            waveform = torch.nn.functional.interpolate(
                waveform[None, None], size=count, mode="linear", align_corners=True
            )[0, 0]
        if self.noise and _uniform(generator) < self.noise:
            spectrum = torch.fft.rfft(torch.randn(len(waveform), generator=generator))
            slope = _uniform(generator)  # of the amplitude: 0 white, 0.5 pink, 1 brown
            spectrum *= torch.arange(1, len(spectrum) + 1).float() ** -slope
            noise = torch.fft.irfft(spectrum, n=len(waveform))
            decibels = 5 + 25 * _uniform(generator)
            level = waveform.square().mean().sqrt() * 10 ** (-decibels / 20)
            waveform = waveform + noise * (level / noise.square().mean().sqrt().clamp(min=1e-9))
        return waveform

    def mel(self, mel: Tensor, generator: torch.Generator) -> Tensor:
        """mel (M, F) of one clip; it may be changed in place."""
        if self.voice:
            mel = _another_voice(mel, self.voice, generator)
        if not self.masking:
            return mel
        bins, frames = mel.shape

        def draw(top: int) -> int:
            return int(torch.randint(0, top + 1, (), generator=generator))

        mean = mel.mean()
        for _ in range(2):
            width = draw(bins // 6)
            begin = draw(bins - width)
            mel[begin : begin + width] = mean
        for _ in range(draw(1 + frames // 100)):  # about one stretch of up to 0.2 s in two seconds
            width = draw(min(20, frames // 4))
            begin = draw(frames - width)
            mel[:, begin : begin + width] = mean
        return mel


def _another_voice(mel: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    bins = len(mel)
    middles = mel_edges(bins)[1:-1]
    moved = middles * (1 + amount * (2 * _uniform(generator) - 1))
    above = torch.searchsorted(middles, moved).clamp(1, bins - 1)
    part = (moved - middles[above - 1]) / (middles[above] - middles[above - 1])
    warped = torch.lerp(mel[above - 1], mel[above], part.clamp(0, 1).float()[:, None])
    points = torch.randn(1, 1, 6, generator=generator) * amount
    tone = torch.nn.functional.interpolate(points, size=bins, mode="linear", align_corners=True)
    # A log-mel of 1 is 40 dB. Nothing falls below what the frontend cut off under the loudest.
    return (warped + tone[0, 0, :, None]).clamp(min=mel.amin())


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


# Examples to batches


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    num_mel_bins: int = 128,
    pairs: bool = False,
    augment: Augment | None = None,
    generator: torch.Generator | None = None,
    sounds: Sounds | None = None,
    tokenizer: Tokenizer | None = None,
) -> Batch:
    """Pad at the right, make the labels, compute the log-mels.

    examples  none at all make a batch of one padding token, which trains nothing
    pairs     better and worse answers, as Batch says; every example needs a rejected one
    sounds    what is said when; with a tokenizer as well, also of the tokens of transcripts
    """
    written: list[tuple[list[int], list[tuple[int, int]]]] = []
    for example in examples:
        written.append((example.ids, example.answers[-1:] if pairs else example.answers))
    if pairs:
        for example in examples:
            if example.rejected is None:
                raise InputError(f"{example.row.where}: no rejected answer to compare with")
            span = (example.rejected_begin, len(example.rejected))
            written.append((example.rejected, [span]))
    longest = max((len(ids) for ids, _ in written), default=1)
    ids = torch.full((max(1, len(written)), longest), pad_id)
    labels = torch.full_like(ids, IGNORE)
    for i, (tokens, spans) in enumerate(written):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        for begin, end in spans:
            labels[i, begin:end] = ids[i, begin:end]
    clips: list[Tensor] = []
    spoken: list[tuple[int, str]] = []
    known: list[tuple[int, Tensor]] = []
    heard: list[Tensor] = []
    for i, example in enumerate(examples):
        if example.row.transcript:
            spoken.append((len(clips), example.row.transcript))
            if sounds is not None and tokenizer is not None:
                heard += _said(i, example, sounds, tokenizer)
        for name, clip in zip(example.row.clips, example.clips, strict=True):
            if sounds is not None:
                names = sounds.frames(name, clip_lengths(len(clip)).conv_frames)
                if names is not None:
                    known.append((len(clips), names))
            clips.append(clip)
    mel = conv_frames = None
    if clips:
        mels = [log_mel(clip, num_mel_bins) for clip in clips]
        if augment is not None and generator is not None:
            mels = [augment.mel(one, generator) for one in mels]
        mel = mels[0].new_zeros(len(mels), num_mel_bins, max(one.shape[1] for one in mels))
        for place, one in zip(mel, mels, strict=True):
            place[:, : one.shape[1]] = one
        conv_frames = torch.tensor([clip_lengths(len(clip)).conv_frames for clip in clips])
    return Batch(
        ids,
        labels,
        mel,
        conv_frames,
        sum(map(len, clips)) / SAMPLE_RATE,
        sum(len(tokens) for tokens, _ in written),
        spoken=spoken,
        sounds=known,
        heard=torch.cat(heard) if heard else None,
        pairs=len(examples) if pairs else 0,
    )


def _said(row: int, example: Example, sounds: Sounds, tokenizer: Tokenizer) -> list[Tensor]:
    """Batch.heard of one transcript: a token is taken to be said when as much of the speech has
    passed as of the text's bytes, give or take a quarter of a second."""
    begin, end = example.answers[-1]
    sizes = torch.tensor([len(tokenizer.bytes_of(token)) for token in example.ids[begin:end]])
    sizes = sizes.double()
    middles = (sizes.cumsum(0) - sizes / 2) / sizes.sum().clamp(min=1)
    times = sounds.when(example.row.clips[0], middles)
    if times is None:
        return []
    first = example.ids.index(tokenizer.id_of(AUDIO))
    place = (times * 25).long()  # an audio token is 40 ms long
    length = clip_lengths(len(example.clips[0])).audio_tokens
    low = first + (place - 6).clamp(0, length - 1)
    high = first + (place + 7).clamp(1, length)
    positions = torch.arange(begin, end)
    found = torch.stack([torch.full_like(positions, row), positions, low, high], dim=1)
    return [found[sizes > 0]]


class Loader:
    """Row numbers to a batch: what a worker process does. Indexed by (seed, row numbers)."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        *,
        num_mel_bins: int = 128,
        limit: int | None = None,
        pairs: bool = False,
        augment: Augment | None = None,
        sounds: Sounds | None = None,
        attend: bool = False,
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.id_of("<|endoftext|>")
        self.num_mel_bins = num_mel_bins
        self.limit = limit
        self.pairs = pairs
        self.augment = augment
        self.sounds = sounds
        self.attend = attend  # place the tokens of transcripts, for the loss that needs it

    def __getitem__(self, item: tuple[int, list[int]]) -> Batch:
        seed, numbers = item
        generator = torch.Generator().manual_seed(seed)
        examples, bad = self.examples(numbers, generator)
        batch = collate(
            examples,
            self.pad_id,
            num_mel_bins=self.num_mel_bins,
            pairs=self.pairs,
            augment=self.augment,
            generator=generator,
            sounds=self.sounds,
            tokenizer=self.tokenizer if self.attend else None,
        )
        batch.bad = bad
        return batch

    def examples(
        self, numbers: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[list[Example], list[str]]:
        """Those that can be read, and one line for each that cannot."""
        change: Change | None = None
        if self.augment is not None and generator is not None:
            augment, drawn = self.augment, generator

            def change(waveform: Tensor) -> Tensor:
                return augment.waveform(waveform, drawn)

        examples: list[Example] = []
        bad: list[str] = []
        for number in numbers:
            try:
                row = self.rows[number]
                if self.pairs and row.rejected is None:
                    raise InputError(f"{row.where}: no rejected answer to compare with")
                examples.append(encode(row, self.tokenizer, limit=self.limit, change=change))
            except InputError as error:
                bad.append(str(error))
        return examples, bad
