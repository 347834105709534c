"""Lines of jsonl to batches of ids, labels and log-mels.

    file --scan--> index of rows --plan--> batches of row numbers --encode, collate--> Batch

Only the index is in memory: where each line begins, how many seconds and characters it holds. Rows
are read when their batch is due. Which rows form which batch follows from the seed and the epoch
alone, so a resumed run meets the same batches.

Two forms of a row:

    {"audio": "a.wav", "prompt": "Recognize the speech: <|en|>", "gt": "hello", "source": "asr_en"}
        as the published evaluation files: the clip, the prompt without any markup, the answer, and
        <|endoftext|>. Trained on: answer and end.
    {"messages": [{"role": "user", "content": "<audio>What is it?"}, ...], "audios": ["a.wav"]}
        as ms-swift: the chat template. Trained on: each assistant's turn with its <|im_end|>.

Paths are relative to the jsonl file. "seconds" (of all clips) may stand in a row and saves opening
the clip while the index is made.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2audio_core import audio, chat
from qwen2audio_core.chat import AUDIO, AUDIO_BOS, AUDIO_EOS
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import SAMPLE_RATE, clip_lengths, log_mel
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.training.losses import IGNORE

PLACEHOLDER = "<audio>"  # a clip's place in a message, as ms-swift and LLaMA-Factory write it
TAGS = re.compile(r"<\|[^|]*\|>")


@dataclass(frozen=True)
class Row:
    """One line, whatever its form."""

    clips: list[str]
    messages: list[dict[str, Any]]  # empty for the official form
    prompt: str
    answer: str  # of the official form
    source: str  # which task and set it comes from; "asr_en" and its like are transcripts
    seconds: float | None
    where: str  # file:line

    @property
    def transcript(self) -> str:
        """Letters and digits said in the clip, where the row's task is to write them down."""
        if not self.source.startswith("asr") or len(self.clips) != 1:
            return ""
        text = TAGS.sub("", self.answer).casefold()
        return " ".join("".join(c if c.isalnum() else " " for c in text).split())

    @property
    def characters(self) -> int:
        texts = [self.prompt, self.answer, *(message["content"] for message in self.messages)]
        return sum(map(len, texts))


@dataclass(frozen=True)
class Example:
    """One row as the model sees it."""

    ids: list[int]
    answers: list[tuple[int, int]]  # spans of ids that are trained on
    clips: list[Tensor]  # waveforms (N,)
    row: Row


@dataclass
class Batch:
    """Examples of unequal lengths, padded at the right: then no attention needs a mask."""

    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)  ids, IGNORE where nothing is trained
    mel: Tensor | None  # (n, M, F)
    conv_frames: Tensor | None  # (n,)
    seconds: float  # of audio
    tokens: int  # without padding
    spoken: list[tuple[int, str]] = field(default_factory=list)  # clip of the batch, its transcript

    @property
    def supervised(self) -> int:
        """Positions that are trained on."""
        return int((self.labels[:, 1:] != IGNORE).sum())


def parse(raw: Any, where: str, folder: Path) -> Row:
    """A line's content to a row. InputError names what is wrong with it."""
    if not isinstance(raw, dict):
        raise InputError(f"{where}: a {type(raw).__name__}, expected an object")
    source = _text(raw, "source", where, raw.get("task", ""))
    seconds = raw.get("seconds")
    if seconds is not None and (not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e6):
        raise InputError(f"{where}: seconds is {seconds!r}, expected a number")
    if "messages" in raw:
        clips = raw.get("audios") or []
        if isinstance(clips, str):
            clips = [clips]
        if not isinstance(clips, list) or not all(isinstance(clip, str) for clip in clips):
            raise InputError(f"{where}: audios must be a list of files")
        messages = raw["messages"]
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{where}: messages must be a list of turns")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in chat.ROLES:
                raise InputError(f"{where}: a turn needs a role, one of {', '.join(chat.ROLES)}")
            _text(message, "content", where)
        places = sum(message["content"].count(PLACEHOLDER) for message in messages)
        if places != len(clips):
            raise InputError(f"{where}: {places} times {PLACEHOLDER} for {len(clips)} audios")
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{where}: the last turn is not the assistant's, nothing to learn")
        return Row(
            [_path(clip, folder) for clip in clips], messages, "", "", source, seconds, where
        )
    if "gt" in raw:
        clips = [_path(_text(raw, "audio", where), folder)] if raw.get("audio") else []
        prompt, answer = _text(raw, "prompt", where), _text(raw, "gt", where)
        if not answer:
            raise InputError(f"{where}: gt is empty, nothing to learn")
        return Row(clips, [], prompt, answer, source, seconds, where)
    raise InputError(
        f"{where}: neither messages nor gt; expected audio, prompt, gt or messages, audios"
    )


def _text(raw: dict[str, Any], key: str, where: str, default: Any = None) -> str:
    value = raw.get(key, default)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} is {value!r}, expected a text")
    return value


def _path(clip: str, folder: Path) -> str:
    return clip if "://" in clip or clip.startswith("data:") else str(folder / clip)


def encode(row: Row, tokenizer: Tokenizer) -> Example:
    """Tokenize a row and read its clips. InputError for a clip that cannot be read."""
    try:
        if row.messages:
            clips = iter(row.clips)
            turns = [
                {"role": turn["role"], "content": list(_items(turn["content"], clips))}
                for turn in row.messages
            ]
            prompt = chat.encode(turns, tokenizer, add_generation_prompt=False, long="error")
            return Example(prompt.ids, prompt.answers, prompt.clips, row)
        waveforms = [_clip(clip) for clip in row.clips]
        ids: list[int] = []
        for waveform in waveforms:
            places = clip_lengths(len(waveform)).audio_tokens
            ids += [tokenizer.id_of(AUDIO_BOS), *[tokenizer.id_of(AUDIO)] * places]
            ids.append(tokenizer.id_of(AUDIO_EOS))
        ids += tokenizer.encode(row.prompt, special=True)
        begin = len(ids)
        ids += tokenizer.encode(row.answer, special=True)
        ids.append(tokenizer.id_of("<|endoftext|>"))
        return Example(ids, [(begin, len(ids))], waveforms, row)
    except InputError as error:
        raise type(error)(f"{row.where}: {error}") from error


def _items(content: str, clips: Iterator[str]) -> Iterator[str | dict[str, str]]:
    first, *others = content.split(PLACEHOLDER)
    if first:
        yield first
    for text in others:
        yield {"type": "audio", "audio": next(clips)}
        if text:
            yield text


def _clip(source: str) -> Tensor:
    (piece,) = audio.split(audio.load(source), "error", name=source)
    return piece.waveform


class Rows:
    """The index of one or several jsonl files.

    bad  one line for each row that cannot be used, "file:line: why"
    """

    def __init__(self, files: Sequence[str | Path], count_characters: bool = False):
        self.files = [Path(file) for file in files]
        self.bad: list[str] = []
        self.characters: Counter[str] = Counter()  # of the transcripts, if they are counted
        file_of, offset, line_of, seconds, size = [], [], [], [], []
        for number, file in enumerate(self.files):
            try:
                lines = file.open("rb")
            except OSError as error:
                raise InputError(f"{file}: cannot read it ({error.strerror})") from error
            with lines:
                at = 0
                for line, content in enumerate(lines, start=1):
                    begin, at = at, at + len(content)
                    if not content.strip():
                        continue
                    try:
                        row = self._parse(content, file, line)
                        length = row.seconds if row.seconds is not None else _seconds(row)
                    except InputError as error:
                        self.bad.append(str(error))
                        continue
                    if count_characters:
                        self.characters.update(row.transcript)
                    file_of.append(number)
                    offset.append(begin)
                    line_of.append(line)
                    seconds.append(length)
                    size.append(row.characters)
        self._file = torch.tensor(file_of, dtype=torch.int32)
        self._offset = torch.tensor(offset, dtype=torch.int64)
        self._line = torch.tensor(line_of, dtype=torch.int32)
        self.seconds = torch.tensor(seconds, dtype=torch.float32)
        self.size = torch.tensor(size, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self._offset)

    def __getitem__(self, i: int) -> Row:
        file = self.files[int(self._file[i])]
        with file.open("rb") as lines:
            lines.seek(int(self._offset[i]))
            return self._parse(lines.readline(), file, int(self._line[i]))

    @staticmethod
    def _parse(content: bytes, file: Path, line: int) -> Row:
        where = f"{file}:{line}"
        try:
            raw = json.loads(content)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        return parse(raw, where, file.parent)


def _seconds(row: Row) -> float:
    try:
        return sum(len(audio.load(clip)) for clip in row.clips) / SAMPLE_RATE
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error


def plan(
    rows: Rows,
    epoch: int,
    *,
    batch_seconds: float,
    batch_tokens: int,
    seed: int = 0,
    short_first: int = 0,
) -> list[list[int]]:
    """One epoch's batches as row numbers, all rows once, in a random order of batches.

    Rows of like length lie together: rows are sorted by length with some noise, then cut where the
    padded batch would pass a limit.

    batch_seconds  of audio in a batch, padding counted
    batch_tokens   of text and audio (25 a second; a token of text is taken for 3 characters)
    short_first    in epoch 0, so many batches from the front are put in order of length
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    tokens = rows.seconds * 25 + rows.size / 3 + 8
    noise = 1 + 0.1 * torch.rand(len(rows), generator=generator)
    # Whole seconds, then tokens: what shares a batch is alike in both.
    order = (tokens * noise).argsort()
    batches: list[list[int]] = []
    longest = most = 0.0
    now: list[int] = []
    for i in order.tolist():
        length, count = float(rows.seconds[i]), float(tokens[i])
        if now and (
            max(longest, length) * (len(now) + 1) > batch_seconds
            or max(most, count) * (len(now) + 1) > batch_tokens
        ):
            batches.append(now)
            now, longest, most = [], 0.0, 0.0
        now.append(i)
        longest, most = max(longest, length), max(most, count)
    if now:
        batches.append(now)
    batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    if epoch == 0 and short_first:
        front = batches[:short_first]
        front.sort(key=lambda batch: float(tokens[batch].mean()))
        batches[:short_first] = front
    return batches


@dataclass(frozen=True)
class Masking:
    """SpecAugment (arXiv 1904.08779): bands of frequency and stretches of time put to the mean."""

    bands: int = 2
    widest: int = 20  # mel bins of one band
    stretches_per_second: float = 0.5
    longest: float = 0.2  # s of one stretch

    def __call__(self, mel: Tensor, generator: torch.Generator) -> Tensor:
        """mel (M, F) of one clip, changed in place."""
        bins, frames = mel.shape

        def draw(top: int) -> int:
            return int(torch.randint(0, top + 1, (), generator=generator))

        mean = mel.mean()
        for _ in range(self.bands):
            width = draw(self.widest)
            begin = draw(bins - width)
            mel[begin : begin + width] = mean
        for _ in range(draw(round(2 * self.stretches_per_second * frames / 100))):
            width = draw(min(round(100 * self.longest), frames // 4))
            begin = draw(frames - width)
            mel[:, begin : begin + width] = mean
        return mel


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    num_mel_bins: int = 128,
    masking: Masking | None = None,
    generator: torch.Generator | None = None,
) -> Batch:
    """Pad at the right, make the labels, compute the log-mels."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORE)
    clips: list[Tensor] = []
    spoken = []
    for i, example in enumerate(examples):
        row = torch.tensor(example.ids)
        ids[i, : len(row)] = row
        for begin, end in example.answers:
            labels[i, begin:end] = row[begin:end]
        if example.row.transcript:
            spoken.append((len(clips), example.row.transcript))
        clips += example.clips
    mel = conv_frames = None
    if clips:
        mels = [log_mel(clip, num_mel_bins) for clip in clips]
        if masking is not None and generator is not None:
            mels = [masking(one, generator) for one in mels]
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
        sum(len(example.ids) for example in examples),
        spoken,
    )
