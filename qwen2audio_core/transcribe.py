"""Recordings of any length to text, subtitles and tables, with the published recognition prompt.

    file --audio--> waveform --split--> windows of at most 30 s --raw prompts, in batches-->
    answers --> segments (start, end, text) --> txt, srt, vtt, tsv, json, laid out as Whisper's

The model gives no times of its own here: a segment is a window, and a window ends where the
recording is quietest. Every window is put to the model, silent ones too; a segment in which it
heard no words has no text, and no line in any format but json.
"""

import itertools
import json
import os
import re
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from torch import Tensor

from qwen2audio_core import audio, chat
from qwen2audio_core.assistant import Assistant, Reply, StopWriter, change
from qwen2audio_core.attribution import answered
from qwen2audio_core.audio_files import source_name
from qwen2audio_core.chat import Prompt
from qwen2audio_core.errors import AudioError, CheckpointError, InputError
from qwen2audio_core.frontend import MAX_SECONDS, SAMPLE_RATE
from qwen2audio_core.sampling import Settings, check_seed, check_whole
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.word_times import Word, is_unspaced, word_times

# Of the published evaluation, which writes the language's tag behind it to begin the answer.
RECOGNIZE = "Detect the language and recognize the speech: "
TRANSLATE = "Detect the language and translate the speech into English: "
CLIP = "<|audio_bos|><|AUDIO|><|audio_eos|>"

# The tags of the published tokenizer, Taiwan's Mandarin, Cantonese, Wu and Min Nan among them.
SPACED = ("en", "de", "es", "ko", "fr", "it", "ru", "pt", "ar")
ASKED = ("language", "prompt", "translate")  # options of Scribe
TOGETHER = 16  # batches of windows of short recordings that are sorted by length
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
    avg_logprob: float | None = None  # mean of the ids'; None where nobody asked

    @property
    def compression_ratio(self) -> float:
        """Bytes of the text over those it takes compressed: above 2.4 it repeats itself, says
        Whisper's code, which this comes from."""
        text = self.text.encode()
        return len(text) / len(zlib.compress(text))


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
            together = segment.language in UNSPACED or is_unspaced(segment.text[:1])
            text += ("" if together or not text or not segment.text else " ") + segment.text
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
        logprobs = [likelihood.logprob for likelihood in reply.logprobs]
        return Segment(
            window.start,
            window.end,
            _clean(reply.text),
            "en" if self._translate else next(named, None),
            reply.ids,
            reply.finish_reason,
            avg_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
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
    batch_size   windows answered at once; fewer need less memory. In bfloat16 an answer may depend
                 on it, where two tokens are as good as alike
    words        also time every word, by one more run over each window: see word_times.py
    notice       called with one line when an answer was cut off by max_new_tokens
    on_progress  called with (done, whole), seconds of sound: at the beginning, then for each batch
    options      seed, stop, logprobs (for avg_logprob, 0 is enough), and generation settings as in
                 Assistant. Greedy, with the checkpoint's repetition penalty, unless temperature,
                 top_k or top_p is given
    errors       AudioError for the recording; PromptError or InputError for the rest
    """
    ask = _Asking(
        assistant,
        language=language,
        prompt=prompt,
        translate=translate,
        batch_size=batch_size,
        words=words,
        notice=notice,
        **options,
    )
    recording = _Recording.of(source)
    if on_progress is not None:
        on_progress(0.0, recording.duration)
    for _ in ask.about([recording]):
        if on_progress is not None:
            on_progress(recording.done, recording.duration)
    return recording.transcript()


@dataclass(eq=False)
class _Recording:
    """One on its way to a transcript."""

    name: str
    windows: list[audio.Piece]
    seconds: dict[str, float]
    segments: dict[int, Segment] = field(default_factory=dict)  # by the number of the window
    done: float = 0.0  # s of sound

    @classmethod
    def of(cls, source: Any) -> "_Recording":
        began = time.perf_counter()
        samples, rate = source if isinstance(source, tuple) else (source, None)
        name = source_name(source) if rate is None else "the recording"
        pieces = windows(audio.load(samples, sampling_rate=rate, name=name), name)
        return cls(name, pieces, {"audio": time.perf_counter() - began})

    @property
    def duration(self) -> float:
        return self.windows[-1].end

    @property
    def finished(self) -> bool:
        return len(self.segments) == len(self.windows)

    def transcript(self) -> Transcript:
        return joined([segment for _, segment in sorted(self.segments.items())], self.seconds)


class _Asking:
    """Windows to the model, in batches. Arguments as in `transcribe`."""

    def __init__(
        self,
        assistant: Assistant,
        *,
        batch_size: int = 8,
        words: bool = False,
        notice: Callable[[str], None] | None = None,
        **options: Any,
    ):
        asked = {name: options.pop(name) for name in ASKED if name in options}
        self._scribe = Scribe(assistant.tokenizer, **asked)
        if unknown := options.keys() & {"answers", "after"}:
            raise InputError(f"a transcript takes no option {min(unknown)!r}")
        check_seed(options.get("seed"))
        StopWriter(assistant.tokenizer, options.get("stop"))
        if options.get("logprobs") is not None:
            check_whole("logprobs", options["logprobs"], 0)
        settings = options.keys() - {"seed", "stop", "logprobs"}
        change(Settings(), **{name: options[name] for name in settings})
        if all(options.get(name) is None for name in ("greedy", "temperature", "top_k", "top_p")):
            options = {**options, "greedy": True}
        self.batch_size = check_whole("batch_size", batch_size, 1)
        self._assistant, self._options = assistant, options
        self._words, self._notice = words, notice

    def about(self, recordings: Sequence[_Recording]) -> Iterator[list[_Recording]]:
        """Ask about every window; after each batch come the recordings that it brought further."""
        waiting = [
            (recording, number)
            for recording in recordings
            for number in range(len(recording.windows))
        ]
        if len(recordings) > 1:  # those of like length together: none is padded, or waits, for long
            waiting.sort(key=lambda one: len(one[0].windows[one[1]].waveform))
        for first in range(0, len(waiting), self.batch_size):
            batch = waiting[first : first + self.batch_size]
            self._ask(batch)
            yield list(dict.fromkeys(recording for recording, _ in batch))

    def _ask(self, batch: Sequence[tuple[_Recording, int]]) -> None:
        pieces = [recording.windows[number] for recording, number in batch]
        prompts = [self._scribe.prompt(window) for window in pieces]
        replies = self._assistant.stream_prompts(prompts, answers=1, **self._options).finished()
        for (recording, number), window, reply in zip(batch, pieces, replies, strict=True):
            for stage, spent in reply.seconds.items():
                before = recording.seconds.get(stage, 0.0)
                recording.seconds[stage] = before + spent / len(batch)
            segment = self._scribe.segment(window, reply)
            if self._words:
                segment = replace(segment, words=_timed(self._assistant, window, reply))
            recording.segments[number] = segment
            recording.done += window.end - window.start
            if reply.finish_reason == "length" and self._notice is not None:
                self._notice(cut_notice(segment, recording.name))


def _timed(assistant: Assistant, window: audio.Piece, reply: Reply) -> list[Word]:
    """The words of one window's answer, in seconds of the whole recording."""
    model, ids = assistant.model, reply.ids
    batch = answered(reply.prompt, ids, model)
    found = word_times(model, assistant.tokenizer, batch, ids, window.waveform) if ids else []
    left = "".join(reply.text.split())  # a stop string is among the ids, and not in the text
    words = []
    for word in found:
        size = len("".join(word.text.split()))
        if not left:
            break
        words.append(
            replace(
                word,
                text=word.text if size <= len(left) else left,
                start=round(window.start + word.start, 3),
                end=round(window.start + word.end, 3),
            )
        )
        left = left[size:]
    return words


def _ignore(line: str) -> None:
    pass


def _instruction(
    tokenizer: Tokenizer, language: str | None, prompt: str | None, translate: bool = False
) -> str:
    text = TRANSLATE if translate else RECOGNIZE
    for name, value in (("language", language), ("prompt", prompt)):
        if not isinstance(value, str | None):
            raise InputError(f"{name} is {value!r:.60}, it must be a string")
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
    return json.dumps(_content(transcript), ensure_ascii=False, indent=2) + "\n"


def json_line(source: str, transcript: Transcript) -> str:
    """The same on one line, with its "file" in front: a path as it was given, a URL without what
    might be secret in it."""
    is_url = re.match("[a-z][a-z0-9+.-]*:", source, re.I) and not os.path.exists(source)
    content = {"file": source_name(source) if is_url else source, **_content(transcript)}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _content(transcript: Transcript) -> dict[str, Any]:
    return {
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
                "compression_ratio": segment.compression_ratio,
                **({} if segment.avg_logprob is None else {"avg_logprob": segment.avg_logprob}),
                **({} if segment.words is None else {"words": [_word(w) for w in segment.words]}),
            }
            for number, segment in enumerate(transcript.segments)
        ],
        "language": transcript.language,
        "duration": transcript.duration,
    }


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
    file = f": {Path(error.filename2).name}" if error.filename2 else ""
    return InputError(
        f"{folder}: cannot write transcripts there ({why}{file}): choose another folder"
    )


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
    files: Iterable[str | os.PathLike[str]],
    folder: str | Path | None = None,
    formats: Iterable[str] = ("txt",),
    *,
    on_progress: Callable[[str, float, float], None] | None = None,
    **options: Any,
) -> Iterator[Outcome]:
    """Transcribe files; iterate over it to make it work. Outcomes come in the files' order.

    Short recordings are answered together, as many windows at a time as `batch_size` says. A file
    that cannot be heard is an Outcome with an error, and the rest goes on. What would hit every
    file is raised, and as far as possible before the first is begun. A file's transcripts are on
    the disk before its Outcome comes.

    files        paths or URLs. The transcript of talk.wav is called talk.txt, so two files of one
                 name are an error, whatever folders they come from
    folder       where to write, made if need be; None writes nothing
    formats      one or several of FORMATS, or "all"
    on_progress  called with (file, done, whole), seconds of sound
    options      as in `transcribe`
    errors       InputError: options, names that collide, a folder that cannot be written to
    """
    kinds = kinds_of(formats)
    ask = _Asking(assistant, **options)
    if isinstance(files, str | bytes | os.PathLike) or not isinstance(files, Iterable):
        raise InputError(f"files is {files!r:.60}; give a list of them")
    files = list(files)
    for file in files:
        if not isinstance(file, str | os.PathLike):
            raise InputError(f"{type(file).__name__} is no file's name: samples go to transcribe()")
    sources = [os.fsdecode(file) for file in files]
    if folder is not None:
        _check_names(sources, Path(folder), kinds)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise _unwritable(folder, error) from error

    def told(recording: _Recording, source: str) -> list[Path]:
        """Its files, if it is finished and there is a folder."""
        if on_progress is not None:
            on_progress(source, recording.done, recording.duration)
        if folder is None or not recording.finished:
            return []
        return write(recording.transcript(), folder, _stem(source), kinds)

    def finish(group: Sequence[tuple[str, _Recording | AudioError]]) -> Iterator[Outcome]:
        recordings = {one: source for source, one in group if isinstance(one, _Recording)}
        written = {one: told(one, source) for one, source in recordings.items()}
        waiting = deque(group)

        def outcome(source: str, one: _Recording | AudioError) -> Outcome:
            if isinstance(one, AudioError):
                return Outcome(source, error=str(one))
            return Outcome(source, one.transcript(), written[one])

        try:
            for moved in itertools.chain(((),), ask.about(list(recordings))):
                written |= {one: told(one, recordings[one]) for one in moved}
                while waiting and (isinstance(waiting[0][1], AudioError) or waiting[0][1].finished):
                    yield outcome(*waiting.popleft())
        except GeneratorExit:
            raise
        except BaseException:  # Ctrl-C too: what is finished is not lost with the rest
            for source, one in waiting:
                if isinstance(one, AudioError) or (one in written and one.finished):
                    yield outcome(source, one)
            raise

    group: list[tuple[str, _Recording | AudioError]] = []
    held = count = 0.0  # s of sound, and windows
    for source in sources:
        try:
            recording = _Recording.of(source)
        except AudioError as error:
            group.append((source, error))
        else:
            group.append((source, recording))
            held, count = held + recording.duration, count + len(recording.windows)
        if held >= MAX_SECONDS * ask.batch_size or count >= TOGETHER * ask.batch_size:
            yield from finish(group)
            group, held, count = [], 0.0, 0.0
    yield from finish(group)


def _check_names(sources: list[str], folder: Path, kinds: list[str]) -> None:
    owners: dict[str, str] = {}
    inputs = {os.path.realpath(source) for source in sources}
    for source in sources:
        path = folder / _stem(source)
        other = owners.get(path.name.casefold())  # some disks do not tell a from A
        if other is not None and os.path.realpath(other) == os.path.realpath(source):
            raise InputError(f"{source_name(source)}: named twice, leave one out")
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
        for kind in kinds:
            if os.path.isdir(f"{path}.{kind}"):
                raise InputError(f"{path}.{kind}: is a folder, a transcript would be called so")


def _stem(source: str) -> str:
    """The name of a file or URL without folder and extension."""
    if re.match("data:", source, re.I):
        return "audio"
    if re.match("(https?|file)://", source, re.I):
        source = unquote(urlsplit(source).path)
    return Path(source).stem or "audio"
