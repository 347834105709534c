"""Rows of audio and text in files, as training and evaluation read them.

A file holds one row a line, or is one JSON array of rows (LLaMA-Factory). A row may have any
of these forms:

    {"audio": "a.wav", "prompt": "Recognize the speech: <|en|>", "gt": "hello", "source": "asr_en"}
        the published evaluation files: the clip, the prompt without any markup, the answer, and
        <|endoftext|>. Trained on: answer and end.
    {"messages": [{"role": "user", "content": "<audio>What is it?"}, ...], "audios": ["a.wav"]}
        ms-swift, LLaMA-Factory (openai style): the chat template. Trained on: each assistant's
        turn with its <|im_end|>.
    {"conversations": [{"from": "human", "value": "<audio>What is it?"}, ...], "audios": ["a.wav"]}
        LLaMA-Factory (sharegpt style): the same.
    {"query": "<audio>What is it?", "response": "a dog", "history": [[query, response]], ...}
        ms-swift's older form: the same.
    ... "system": "Be brief."                        the system turn
    ... {"role": "assistant", "content": "Hm.", "loss": false}       read and not learned (ms-swift)
    ... "rejected_response": "no"                    a worse last turn, for preference (ms-swift)
    ... "chosen": {turn}, "rejected": {turn}         the last turn twice (LLaMA-Factory)

Clips stand in "audio" or in "audios", one file or a list; null and [] are none. What would be lost
without a word, clips under another key, images and videos, makes a bad row; other keys are ignored.
Paths are relative to the file. "seconds" (of all clips) may stand in a row and saves opening the
clip while the index is made; "source" or "task" names where a row comes from.

To be asked, a row needs no answer: `parse(..., answered=False)`. Then a last turn of the assistant
is what is expected, and a query may hold <|audio_bos|><|AUDIO|><|audio_eos|> where <audio> would
stand, as in the published evaluation.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen2audio_core import audio_files, chat
from qwen2audio_core.chat import AUDIO
from qwen2audio_core.errors import InputError

PLACEHOLDER = "<audio>"  # a clip's place in a message
TAGS = re.compile(r"<\|[^|]*\|>")
CLIPS = ("audio", "audios")  # where a row names them
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # sharegpt's names
SHAPES = (
    '{"audio", "prompt", "gt"}, {"messages", "audios"}, {"conversations", "audios"} or'
    ' {"query", "response", "audios"}'
)


@dataclass(frozen=True)
class Row:
    """One line, whatever its form."""

    clips: list[str]
    messages: list[dict[str, str]]  # empty for the official form
    prompt: str
    answer: str  # of the official form
    rejected: str | None  # what the last answer should not be
    source: str  # which task and set it comes from; "asr_en" and its like are transcripts
    seconds: float | None
    where: str  # file:line, or file:item N of a JSON array
    untaught: frozenset[int] = frozenset()  # messages of the assistant that are not trained on

    @property
    def transcript(self) -> str:
        """Letters and digits said in the clip, where the row's task is to write them down."""
        if not self.source.startswith("asr") or len(self.clips) != 1:
            return ""
        text = TAGS.sub("", self.answer).casefold()
        return " ".join("".join(c if c.isalnum() else " " for c in text).split())

    @property
    def size(self) -> int:
        """Bytes of its texts, with the longer of two answers."""
        texts = [self.prompt, self.answer, *(message["content"] for message in self.messages)]
        answer = self.messages[-1]["content"] if self.messages else self.answer
        sizes = [
            len(text.encode(errors="replace")) for text in (*texts, answer, self.rejected or "")
        ]
        return sum(sizes[:-2]) + max(0, sizes[-1] - sizes[-2])


def lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and content of each row; below 0 is the number of one in a JSON array."""
    try:
        with file.open("rb") as opened:
            if opened.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
                yield from _items_of(opened, file)
                return
            opened.seek(0)
            at = 0
            for number, content in enumerate(opened, start=1):
                if content.strip():
                    yield number, at, content
                at += len(content)
    except OSError as error:
        raise InputError(f"{file}: cannot read it ({error.strerror})") from error


def _items_of(array: BinaryIO, file: Path) -> Iterator[tuple[int, int, bytes]]:
    array.seek(0)
    content = array.read()
    # One character a byte, so that places in the text are places in the file.
    text, decoder, number = content.decode("latin-1"), json.JSONDecoder(), 0
    at = text.index("[") + 1
    behind = re.compile(r"[ \t\n\r]*")

    def skip(place: int) -> int:
        found = behind.match(text, place)
        assert found is not None
        return found.end()

    try:
        at = skip(at)
        if text[at : at + 1] != "]":
            while True:
                _, end = decoder.raw_decode(text, at)
                number += 1
                yield -number, at, content[at:end]
                at = skip(end)
                if text[at : at + 1] != ",":
                    break
                at = skip(at + 1)
        if text[at : at + 1] != "]":
            raise ValueError("expected , or ]")
        if text[at + 1 :].strip():
            raise ValueError("more behind the array's end; rows that are arrays are not read")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: not a JSON array of rows behind item {number} ({error}); one object a line,"
            " jsonl, is read as well"
        ) from error


def place_of(file: Path, line: int) -> str:
    return f"{file}:{line}" if line > 0 else f"{file}:item {-line}"


def parsed(content: bytes, file: Path, line: int) -> Row:
    """`parse` of what `lines` found."""
    where = place_of(file, line)
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    return parse(raw, where, file.parent)


def parse(raw: Any, where: str, folder: Path, answered: bool = True) -> Row:
    """A line's content to a row.

    where     file and line, for errors
    folder    that the clips' paths begin in
    answered  there is an answer to learn from; without, it may be empty or missing
    errors    InputError names what is wrong
    """
    if not isinstance(raw, dict):
        raise InputError(f"{where}: a {type(raw).__name__}, expected an object")
    source = _text(raw, "source", where, raw.get("task") or "")
    clips = _clips(raw, where, folder)
    _nothing_else_to_hear(raw, where, CLIPS)
    if answered and raw.get("label") is False:  # ms-swift's, for KTO
        raise InputError(
            f"{where}: label is false, and a bad answer is not learned by itself: pairs of a better"
            " and a worse one are"
        )
    seconds = raw.get("seconds")
    if not (seconds is None or (seconds == 0 and not clips)) and (
        not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds < 1e6
    ):
        raise InputError(f"{where}: seconds is {seconds!r}, expected a number above 0")
    turns = ["messages", "conversations"] + ["query"] * (raw.get("gt") is None)
    if any(raw.get(key) is not None for key in turns):
        messages, untaught, rejected = _conversation(raw, where, answered)
        places = [message["content"].count(PLACEHOLDER) for message in messages]
        if not answered and not any(places):
            places = [message["content"].count(AUDIO) for message in messages]
        if sum(places) != len(clips):
            raise InputError(
                f"{where}: {sum(places)} {PLACEHOLDER} in the turns for {len(clips)} audios"
            )
        if not answered:
            return Row(clips, messages, "", "", rejected, source, seconds, where, untaught)
        # What follows the last turn to learn from is not even read.
        end = 1 + max(
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and i not in untaught
        )
        clips, untaught = clips[: sum(places[:end])], frozenset(i for i in untaught if i < end)
        return Row(clips, messages[:end], "", "", rejected, source, seconds, where, untaught)
    if "gt" in raw or ("prompt" in raw and not answered):
        prompt = _text(raw, "prompt", where)
        answer = _text(raw, "gt", where, None if answered else "")
        if answered and not answer.strip():
            raise InputError(f"{where}: gt is empty, there is nothing to learn")
        if not clips and not prompt:
            raise InputError(f"{where}: neither audio nor prompt, there is nothing to answer")
        if PLACEHOLDER in prompt:
            raise InputError(
                f"{where}: {PLACEHOLDER} in the prompt, before which the clips stand by"
                " themselves: take it out"
            )
        _no_pictures(prompt, f"{where}: prompt")
        worse = [key for key in ("rejected", "rejected_response") if raw.get(key) is not None]
        rejected = _text(raw, worse[0], where) if worse else None
        return Row(clips, [], prompt, answer, rejected, source, seconds, where)
    raise InputError(
        f"{where}: unknown form, found {', '.join(raw) or 'nothing'}; expected {SHAPES}"
    )


def turns(messages: Sequence[dict[str, str]], clips: Iterable[Any]) -> list[dict[str, Any]]:
    """Turns for chat.encode, each <audio> replaced by the next of the content items `clips`."""
    rest = iter(clips)
    return [
        {"role": turn["role"], "content": list(_items(turn["content"], rest))} for turn in messages
    ]


def _items(content: str, clips: Iterator[Any]) -> Iterator[Any]:
    first, *others = content.split(PLACEHOLDER)
    yield first
    for text in others:
        yield next(clips)
        yield text


def _conversation(
    raw: dict[str, Any], where: str, answered: bool
) -> tuple[list[dict[str, str]], frozenset[int], str | None]:
    """The turns, which of them are not to be learned, and the worse last answer."""
    found = _turns(raw, where, answered)
    given = [(_turn(turn, place), _taught(turn, place)) for turn, place in found]
    system = _text(raw, "system", where, "")
    if system:
        if any(message["role"] == "system" for message, _ in given):
            raise InputError(f"{where}: both system and a system turn, leave one of them out")
        given.insert(0, ({"role": "system", "content": system}, True))
    rejected = None
    if raw.get("rejected_response") is not None:
        rejected = _answer(_text(raw, "rejected_response", where), f"{where}: rejected_response")
    elif raw.get("rejected") is not None:
        rejected = _answer(raw["rejected"], f"{where}: rejected")
    if raw.get("chosen") is not None:
        better, place = raw["chosen"], f"{where}: chosen"
        message = {"role": "assistant", "content": _answer(better, place)}
        given.append((message, isinstance(better, str) or _taught(better, place)))
    untaught = frozenset(
        i
        for i, (message, learned) in enumerate(given)
        if message["role"] == "assistant" and not learned
    )
    messages = [message for message, _ in given]
    if not answered:
        return messages, untaught, rejected
    if not given or given[-1][0]["role"] != "assistant":
        raise InputError(
            f"{where}: the last turn is not the assistant's, there is nothing to learn"
        )
    answers = [(message, learned) for message, learned in given if message["role"] == "assistant"]
    if not all(message["content"] for message, _ in answers):
        raise InputError(f"{where}: an assistant's turn is empty, there is nothing to learn")
    if not any(learned for _, learned in answers):
        raise InputError(f"{where}: loss is false in each answer, there is nothing to learn")
    if rejected is not None and not answers[-1][1]:
        raise InputError(f"{where}: loss is false in the turn that is compared with a worse one")
    return messages, untaught, rejected


def _turns(raw: dict[str, Any], where: str, answered: bool) -> list[tuple[Any, str]]:
    """The turns as they stand there, and where each does."""
    for key in ("messages", "conversations"):
        turns = raw.get(key)
        if turns is None:
            continue
        if not isinstance(turns, list) or not turns:
            raise InputError(f"{where}: {key} must be a list of turns")
        return [(turn, f"{where}: {key}[{i}]") for i, turn in enumerate(turns)]
    exchanges: list[tuple[Any, str]] = []
    history = raw.get("history") or []
    if not isinstance(history, list):
        raise InputError(f"{where}: history is {history!r:.40}, expected a list of exchanges")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise InputError(f"{where}: history[{i}] is {pair!r:.40}, expected [query, response]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            exchanges.append(({"role": role, "content": text}, f"{where}: history[{i}]"))
    query = {"role": "user", "content": _text(raw, "query", where)}
    exchanges.append((query, f"{where}: query"))
    given = raw.get("response") is not None
    if given or (raw.get("chosen") is None and answered):
        response = {"role": "assistant", "content": _text(raw, "response", where)}
        exchanges.append((response, f"{where}: response"))
    return exchanges


def _answer(turn: Any, where: str) -> str:
    if isinstance(turn, str):
        turn = {"role": "assistant", "content": turn}
    message = _turn(turn, where)
    if message["role"] != "assistant":
        raise InputError(f"{where}: the turn is the {message['role']}'s, not the assistant's")
    return message["content"]


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise InputError(f"{where} is a {type(turn).__name__}, expected an object")
    role = turn.get("role", turn.get("from"))
    role = SPEAKERS.get(role, role) if isinstance(role, str) else role
    if role not in chat.ROLES:
        raise InputError(f"{where}: role is {role!r}, expected one of {', '.join(chat.ROLES)}")
    _nothing_else_to_hear(turn, where)
    key = "value" if "from" in turn else "content"
    if isinstance(turn.get(key), list):
        raise InputError(
            f"{where}: {key} is a list of parts, expected one text with {PLACEHOLDER} at each"
            " clip's place, and the clips in audios beside the turns"
        )
    content = _text(turn, key, where)
    if role != "assistant":
        _no_pictures(content, where)
    elif PLACEHOLDER in content:
        raise InputError(
            f"{where}: {PLACEHOLDER} in an assistant's turn, the model answers in text alone:"
            " take it out"
        )
    return {"role": role, "content": content}


def _taught(turn: dict[str, Any], where: str) -> bool:
    loss = turn.get("loss")
    if not isinstance(loss, bool | None):
        raise InputError(f"{where}: loss is {loss!r:.40}, expected true or false")
    return loss is not False


def _clips(raw: dict[str, Any], where: str, folder: Path) -> list[str]:
    given = {key: raw[key] for key in CLIPS if raw.get(key) not in (None, "", [])}
    if len(given) > 1:
        raise InputError(f"{where}: both {' and '.join(given)} name clips, leave one of them out")
    for key, clips in given.items():
        clips = clips if isinstance(clips, list) else [clips]
        if not all(isinstance(clip, str) and clip for clip in clips):
            raise InputError(
                f"{where}: {key} is {raw[key]!r:.60}, expected a file or a list of files"
            )
        return [path_of(clip, folder) for clip in clips]
    return []


def _might_be_clips(key: str, value: Any) -> bool:
    """Whether they are files, samples or URLs, and not an id or a length."""
    if not isinstance(value, str):
        return True
    named = re.search("path|file|url|uri|audios?$", key, re.I)
    return bool(named) or Path(value).suffix.lower() in audio_files.SUFFIXES


def _nothing_else_to_hear(raw: dict[str, Any], where: str, known: Sequence[str] = ()) -> None:
    """Refuse clips under a key that is not read, and what the model cannot take in."""
    for key, value in raw.items():
        if key in known or not isinstance(value, (str, list, dict)) or not value:
            continue
        if "audio" in key.lower() and _might_be_clips(key, value):
            raise InputError(
                f"{where}: {key} is not read, clips are named in the row's audio or audios"
            )
        if key.lower() in ("image", "images", "video", "videos"):
            raise InputError(f"{where}: {key}: the model takes sound and text alone")


def _no_pictures(text: str, where: str) -> None:
    for tag in ("<image>", "<video>"):
        if tag in text:
            raise InputError(f"{where}: {tag}: the model takes sound and text alone")


def _text(raw: dict[str, Any], key: str, where: str, default: Any = None) -> str:
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} is {'missing' if value is None else repr(value)[:40]}")
    return value


def path_of(clip: str, folder: Path) -> str:
    return clip if "://" in clip or clip.startswith("data:") else str(folder / clip)
