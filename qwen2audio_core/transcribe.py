"""Recordings of any length to text, subtitles and tables, with the published recognition prompt.

    file --audio--> waveform --split--> windows of at most 30 s --raw prompts, in batches-->
    answers --> segments (start, end, text) --> txt, srt, vtt, tsv, json, laid out as Whisper's

The model gives no times of its own here: a segment is a window, and a window ends where the
recording is quietest. Every window is put to the model, silent ones too; a segment in which it
heard no words has no text, and no line in any format but json.
"""

import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from torch import Tensor

from qwen2audio_core import audio, chat
from qwen2audio_core.assistant import Assistant, Reply
from qwen2audio_core.attribution import answered
from qwen2audio_core.audio_files import source_name
from qwen2audio_core.chat import Prompt
from qwen2audio_core.errors import AudioError, CheckpointError, InputError
from qwen2audio_core.frontend import SAMPLE_RATE
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.word_times import Word, word_times

# Of the published evaluation, which writes the language's tag behind it to begin the answer.
RECOGNIZE = "Detect the language and recognize the speech: "
TRANSLATE = "Detect the language and translate the speech into English: "
CLIP = "<|audio_bos|><|AUDIO|><|audio_eos|>"

# The tags of the published tokenizer, Taiwan's Mandarin, Cantonese, Wu and Min Nan among them.
SPACED = ("en", "de", "es", "ko", "fr", "it", "ru", "pt", "ar")
UNSPACED = ("zh", "ja", "zh_tw", "yue", "wuu", "nan")  # no space between two sentences
LANGUAGES = SPACED + UNSPACED


@dataclass(frozen=True)
class Segment:
    """What was said in one window."""

    start: float  # s from the beginning of the recording
    end: float
    text: str
    # One of LANGUAGES, by the tag in the answer, or else in the prompt; "en" of a translation.
    language: str | None
    ids: list[int]  # the answer's tokens, tags and end token included
    finish_reason: str  # as in Reply; "length" means that words may be missing
    words: list[Word] | None = None  # seconds of the recording; None where nobody asked


@dataclass(frozen=True)
class Transcript:
    """A recording in words."""

    segments: list[Segment]  # the windows in order; together they are the whole recording
    language: str | None  # of most segments
    duration: float  # s
    seconds: dict[str, float] = field(compare=False)  # it took: audio, encode, prefill, decode

    @property
    def text(self) -> str:
        """The segments' texts, joined as their languages are written."""
        text = ""
        for segment in self.segments:
            space = " " if text and segment.text and segment.language not in UNSPACED else ""
            text += space + segment.text
        return text


class Scribe:
    """How a window is put to the model, and its answer read.

    tokenizer  of the model
    language, prompt, translate, errors  as in `transcribe`
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        language: str | None = None,
        prompt: str | None = None,
        translate: bool = False,
    ):
        self._tokenizer = tokenizer
        self._text = CLIP + _instruction(tokenizer, language, prompt, translate)
        self._tags = _tags(tokenizer)
        self._translate = translate

    def prompt(self, window: audio.Piece) -> Prompt:
        """What to ask the model about a window."""
        return chat.encode_raw(
            self._text, [window.waveform], self._tokenizer, sampling_rate=SAMPLE_RATE
        )

    def segment(self, window: audio.Piece, reply: Reply) -> Segment:
        """What the model wrote about a window."""
        said = [*reply.ids, *reversed(reply.prompt.ids)]
        named = (self._tags[i] for i in said if i in self._tags)
        return Segment(
            window.start,
            window.end,
            _clean(reply.text),
            "en" if self._translate else next(named, None),
            reply.ids,
            reply.finish_reason,
        )


def windows(waveform: Tensor, name: str) -> list[audio.Piece]:
    """A recording in windows of at most 30 s, cut where it is quietest."""
    return audio.split(waveform, name=name, notice=_ignore)  # that it is split is no news here


def joined(segments: list[Segment], seconds: dict[str, float] | None = None) -> Transcript:
    """The segments of all windows, in order, to a transcript."""
    heard = Counter(segment.language for segment in segments if segment.language)
    language = max(heard, key=heard.__getitem__, default=None)
    return Transcript(segments, language, segments[-1].end, seconds or {})


def cut_notice(segment: Segment, name: str) -> str:
    """What to tell of a segment whose finish_reason is "length"."""
    return (
        f"{name}: the answer for {_clock(segment.start)} to {_clock(segment.end)} ran into"
        " max_new_tokens, words may be missing"
    )


def transcribe(
    assistant: Assistant,
    source: Any,
    *,
    language: str | None = None,
    prompt: str | None = None,
    translate: bool = False,
    batch_size: int = 8,
    words: bool = False,
    notice: Callable[[str], None] | None = None,
    on_progress: Callable[[float, float], None] | None = None,
    **options: Any,
) -> Transcript:
    """Write down what is said in a recording of any length.

    source       whatever audio.load reads, or an (array, rate) pair
    language     one of LANGUAGES. None: the model names it, window by window
    prompt       what stands behind the clip instead of the published prompt, taken as it is;
                 special tokens in it are tokens. A language's tag is its own part of it, so
                 `language` must be None
    translate    put it into English, with the published prompt for that; a `prompt` given beside
                 it has to ask for that itself
    batch_size   windows answered at once; fewer need less memory
    words        also time every word, by one more run over each window: see word_times.py
    notice       called with one line when an answer was cut off by max_new_tokens
    on_progress  called with (done, whole), seconds of sound: at the beginning, then for each batch
    options      seed, stop, and generation settings as in Assistant. Greedy, with the checkpoint's
                 repetition penalty, unless temperature, top_k or top_p is given
    errors       AudioError for the recording; PromptError or InputError for the rest
    """
    scribe = Scribe(assistant.tokenizer, language, prompt, translate)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, it must be at least 1")
    if all(options.get(name) is None for name in ("greedy", "temperature", "top_k", "top_p")):
        options["greedy"] = True

    began = time.perf_counter()
    samples, rate = source if isinstance(source, tuple) else (source, None)
    name = source_name(source) if rate is None else "the recording"
    waveform = audio.load(samples, sampling_rate=rate, name=name)
    pieces = windows(waveform, name)
    duration = pieces[-1].end
    seconds = {"audio": time.perf_counter() - began}

    segments: list[Segment] = []
    if on_progress is not None:
        on_progress(0.0, duration)
    for first in range(0, len(pieces), batch_size):
        batch = pieces[first : first + batch_size]
        prompts = [scribe.prompt(window) for window in batch]
        replies = assistant.stream_prompts(prompts, answers=1, **options).finished()
        for stage, spent in replies[0].seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
        for window, prompted, reply in zip(batch, prompts, replies, strict=True):
            segments.append(scribe.segment(window, reply))
            if words:
                timed = _timed(assistant, window, prompted, reply.ids)
                segments[-1] = replace(segments[-1], words=timed)
            if reply.finish_reason == "length" and notice is not None:
                notice(cut_notice(segments[-1], name))
        if on_progress is not None:
            on_progress(batch[-1].end, duration)
    return joined(segments, seconds)


def _timed(
    assistant: Assistant, window: audio.Piece, prompt: chat.Prompt, ids: list[int]
) -> list[Word]:
    """The words of one window's answer, in seconds of the whole recording."""
    model = assistant.model
    batch = answered(prompt, ids, model)
    found = word_times(model, assistant.tokenizer, batch, ids, window.waveform) if ids else []
    return [
        replace(
            word, start=round(window.start + word.start, 3), end=round(window.start + word.end, 3)
        )
        for word in found
    ]


def _ignore(line: str) -> None:
    pass


def _instruction(
    tokenizer: Tokenizer, language: str | None, prompt: str | None, translate: bool = False
) -> str:
    text = TRANSLATE if translate else RECOGNIZE
    if prompt is not None:
        if language is not None:
            raise InputError(
                "a prompt is taken as it is: write the language's tag at its end, such as <|en|>,"
                " and leave the language out"
            )
        return prompt
    if language is None:
        return text
    known = _tags(tokenizer).values()
    name = language.lower().replace("-", "_")
    name = name if name in known else name.partition("_")[0]  # en of en-US, but zh_tw of zh-TW
    if name not in known:
        raise InputError(
            f"language {language!r} is not one this tokenizer has a tag for: {', '.join(known)}"
        )
    return f"{text}<|{name}|>"


def _tags(tokenizer: Tokenizer) -> dict[int, str]:
    """Token id -> language, for those that this tokenizer can name."""
    tags = {}
    for code in LANGUAGES:
        with suppress(CheckpointError):
            tags[tokenizer.id_of(f"<|{code}|>")] = code
    return tags


def _clean(text: str) -> str:
    """Without tags, on one line. The published evaluation goes on to change words and signs."""
    return " ".join(re.sub(r"<\|.*?\|>", " ", text).split())


# Formats


def _clock(seconds: float, mark: str = ".") -> str:
    """65.4321 -> 00:01:05.432"""
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    whole, rest = divmod(milliseconds, 1000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{whole:02}{mark}{rest:03}"


def _spoken(transcript: Transcript) -> list[Segment]:
    return [segment for segment in transcript.segments if segment.text]


def to_txt(transcript: Transcript) -> str:
    """A line for each segment."""
    return "".join(f"{segment.text}\n" for segment in _spoken(transcript))


def to_srt(transcript: Transcript) -> str:
    """SubRip subtitles."""
    cues = []
    for number, segment in enumerate(_spoken(transcript), 1):
        text = segment.text.replace("-->", "->")  # would be read as a line of times
        cues.append(f"{number}\n{_span(segment, ',')}\n{text}\n\n")
    return "".join(cues)


def to_vtt(transcript: Transcript) -> str:
    """WebVTT subtitles. W3C, WebVTT, section 4: text escapes what would begin a tag."""
    cues = ["WEBVTT\n\n"]
    for segment in _spoken(transcript):
        text = segment.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{_span(segment, '.')}\n{text}\n\n")
    return "".join(cues)


def _span(segment: Segment, mark: str) -> str:
    return f"{_clock(segment.start, mark)} --> {_clock(segment.end, mark)}"


def to_tsv(transcript: Transcript) -> str:
    """A table of start, end (both in ms) and text, with a head line."""
    rows = ["start\tend\ttext\n"]
    for segment in _spoken(transcript):
        rows.append(f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t{segment.text}\n")
    return "".join(rows)


def to_json(transcript: Transcript) -> str:
    """All of it, under Whisper's names where it has them; times in seconds."""
    content = {
        "text": transcript.text,
        "segments": [
            {
                "id": number,
                "start": segment.start,
                "end": segment.end,
                "text": segment.text,
                "tokens": segment.ids,
                "language": segment.language,
                "finish_reason": segment.finish_reason,
                **({} if segment.words is None else {"words": [_word(w) for w in segment.words]}),
            }
            for number, segment in enumerate(transcript.segments)
        ],
        "language": transcript.language,
        "duration": transcript.duration,
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _word(word: Word) -> dict[str, Any]:
    return {
        "word": word.text,
        "start": word.start,
        "end": word.end,
        "probability": word.probability,
    }


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "txt": to_txt,
    "srt": to_srt,
    "vtt": to_vtt,
    "tsv": to_tsv,
    "json": to_json,
}


def write(
    transcript: Transcript, folder: str | Path, stem: str, formats: Iterable[str] = ("txt",)
) -> list[Path]:
    """Write folder/stem.FORMAT for each format; files of these names are replaced.

    All formats are written aside before the first takes its name, so no file is ever half there.

    formats  one or several of FORMATS, or "all"
    errors   InputError where the folder cannot be written to or the disk is full
    """
    paths = [Path(folder) / f"{stem}.{kind}" for kind in kinds_of(formats)]
    parts = [path.with_name(path.name + ".part") for path in paths]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, part in zip(paths, parts, strict=True):
            text = FORMATS[path.suffix[1:]](transcript)
            part.write_text(text, encoding="utf-8", newline="\n")
        for path, part in zip(paths, parts, strict=True):
            os.replace(part, path)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    return paths


def kinds_of(formats: Iterable[str]) -> list[str]:
    """The formats asked for, "all" spelled out. InputError for one that is unknown."""
    kinds = [formats] if isinstance(formats, str) else list(dict.fromkeys(formats))
    unknown = [kind for kind in kinds if kind not in FORMATS and kind != "all"]
    if unknown or not kinds:
        wanted = f"format {unknown[0]!r} is unknown" if unknown else "no format was given"
        several = re.findall(r"[^,;\s]+", unknown[0]) if unknown else []
        hint = ""
        if len(several) > 1 and set(several) <= {*FORMATS, "all"}:
            hint = "; each by itself: " + " ".join(f"-f {kind}" for kind in several)
        raise InputError(f"{wanted}, expected {', '.join(FORMATS)} or all{hint}")
    return list(FORMATS) if "all" in kinds else kinds


def _unwritable(folder: str | Path, error: OSError) -> InputError:
    why = error.strerror or type(error).__name__
    return InputError(f"{folder}: cannot write transcripts there ({why}): choose another folder")


# Many files


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    source: str
    transcript: Transcript | None = None
    files: list[Path] = field(default_factory=list)  # those that were written
    error: str = ""  # one line that names the file; "" where all went well


def run(
    assistant: Assistant,
    files: Sequence[str | os.PathLike[str]],
    folder: str | Path | None = None,
    formats: Iterable[str] = ("txt",),
    *,
    on_progress: Callable[[str, float, float], None] | None = None,
    **options: Any,
) -> Iterator[Outcome]:
    """Transcribe files one after another; iterate over it to make it work.

    A file that cannot be heard is an Outcome with an error, and the rest goes on. What would hit
    every file is raised, and as far as possible before the first is begun. A file's transcripts are
    on the disk before its Outcome comes.

    files        paths or URLs. The transcript of talk.wav is called talk.txt, so two files of one
                 name are an error, whatever folders they come from
    folder       where to write, made if need be; None writes nothing
    formats      one or several of FORMATS, or "all"
    on_progress  called with (file, done, whole), seconds of sound
    options      as in `transcribe`
    errors       InputError: options, names that collide, a folder that cannot be written to
    """
    kinds = kinds_of(formats)
    _instruction(assistant.tokenizer, options.get("language"), options.get("prompt"))
    sources = [os.fspath(file) for file in files]
    if folder is not None:
        _check_names(sources, Path(folder), kinds)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise _unwritable(folder, error) from error
    for source in sources:
        progress = None if on_progress is None else partial(on_progress, source)
        try:
            transcript = transcribe(assistant, source, on_progress=progress, **options)
        except AudioError as error:
            yield Outcome(source, error=str(error))
            continue
        written = [] if folder is None else write(transcript, folder, _stem(source), kinds)
        yield Outcome(source, transcript, written)


def _check_names(sources: list[str], folder: Path, kinds: list[str]) -> None:
    owners: dict[str, str] = {}
    inputs = {os.path.realpath(source) for source in sources}
    for source in sources:
        path = folder / _stem(source)
        other = owners.get(path.name.casefold())  # some disks do not tell a from A
        if other is not None:
            raise InputError(
                f"{source_name(other)} and {source_name(source)} would both be written to"
                f" {path}.{kinds[0]}: rename one, or transcribe them into two folders"
            )
        owners[path.name.casefold()] = source
        if inputs & {os.path.realpath(f"{path}.{kind}") for kind in kinds}:
            raise InputError(
                f"{source_name(source)}: its transcript would take the place of a recording in"
                f" {folder}: choose another folder"
            )


def _stem(source: str) -> str:
    """The name of a file or URL without folder and extension."""
    if re.match("data:", source, re.I):
        return "audio"
    if re.match("(https?|file)://", source, re.I):
        source = unquote(urlsplit(source).path)
    return Path(source).stem or "audio"
