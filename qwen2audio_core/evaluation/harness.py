"""Rows to answers: asked in batches, written down as they come, gone on with where it was stopped.

items --ask--> answers --scores--> a Score of each source --mistakes--> rows to look at

OUT/run.json       what is asked of what: another run does not go on here
OUT/answers.jsonl  a line for each answer, in the order they came
OUT/scores.json    a Score for each source
OUT/wrong.jsonl    the rows with mistakes, most of them first
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen2audio_core.assistant import Assistant, change
from qwen2audio_core.chat import AUDIO, DEFAULT_SYSTEM, Long, Prompt
from qwen2audio_core.errors import InputError
from qwen2audio_core.evaluation import tasks
from qwen2audio_core.evaluation.manifest import Item
from qwen2audio_core.evaluation.metrics import Score
from qwen2audio_core.evaluation.tasks import Rules
from qwen2audio_core.rows import Row, lines, turns
from qwen2audio_core.sampling import Settings, check_whole
from qwen2audio_core.transcribe import CLIP

TOGETHER = 16  # batches of rows that are sorted by length
# Of the published evaluation. The repetition penalty is the checkpoint's: the scripts leave it so.
PUBLISHED: dict[str, Any] = {"greedy": True, "max_new_tokens": 256, "min_new_tokens": 1}


# By source and kind of answer; a line where there is no score says why.
Scores = dict[tuple[str, Rules], Score | str]


@dataclass(frozen=True)
class Answer:
    """What came of one row."""

    item: Item
    response: str = ""
    finish_reason: str = ""  # as in Reply
    error: str = ""  # why there is no answer: one line


def encode(
    assistant: Assistant,
    row: Row,
    long: Long = "error",
    notice: Callable[[str], None] | None = None,
) -> Prompt:
    """A row as the model is asked it, without the answer that is expected.

    A prompt stands behind its clips without any template, as the base model is asked. A query that
    holds the clips' tokens itself is put into the template letter by letter, as the official script
    does, and turns go through chat.encode.
    """
    if not row.messages:
        return assistant.encode_raw(CLIP * len(row.clips) + row.prompt, row.clips, long, notice)
    messages = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
    if any(AUDIO in message["content"] for message in messages):
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
        said = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        text = "".join((*said, "<|im_start|>assistant\n"))
        return assistant.encode_raw(text, row.clips, long, notice)
    clips = ({"type": "audio", "audio": clip} for clip in row.clips)
    return assistant.encode(turns(messages, clips), long=long, notice=notice)


def ask(
    assistant: Assistant,
    items: Sequence[Item],
    *,
    batch_size: int = 8,
    long: Long = "error",
    notice: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[Answer]:
    """Put rows to the model. Those of like length go together, so that none is padded for long;
    clips are read while the rows before them are answered.

    batch_size  rows answered at once. In bfloat16 an answer may depend on it
    long        what to do with a clip of more than 30 s
    notice      called with a line on what was done to a clip
    options     generation settings as in Assistant, beside PUBLISHED
    """
    check_whole("batch_size", batch_size, 1)
    change(Settings(), **PUBLISHED | options)  # before clips are read
    size = batch_size * TOGETHER
    groups = [items[first : first + size] for first in range(0, len(items), size)]

    def read(group: Sequence[Item]) -> list[tuple[Item, Prompt | InputError]]:
        return [(item, _prompt(assistant, item, long, notice)) for item in group]

    coming: Future[list[tuple[Item, Prompt | InputError]]] | None = None
    with ThreadPoolExecutor(1) as ahead:
        for group in [*groups, None]:
            before, coming = coming, ahead.submit(read, group) if group else None
            if before is None:
                continue
            asked: list[tuple[Item, Prompt]] = []
            for item, prompt in before.result():
                if isinstance(prompt, InputError):
                    yield Answer(item, error=str(prompt))
                else:
                    asked.append((item, prompt))
            asked.sort(key=lambda pair: len(pair[1].ids))
            for first in range(0, len(asked), batch_size):
                batch = asked[first : first + batch_size]
                prompts = [prompt for _, prompt in batch]
                stream = assistant.stream_prompts(prompts, **PUBLISHED | options)
                for (item, _), reply in zip(batch, stream.finished(), strict=True):
                    yield Answer(item, reply.text, reply.finish_reason)


def _prompt(
    assistant: Assistant, item: Item, long: Long, notice: Callable[[str], None] | None
) -> Prompt | InputError:
    assert item.row is not None

    def told(line: str) -> None:
        if notice is not None:
            notice(f"{item.where}: {line}")

    try:
        return encode(assistant, item.row, long, told)
    except InputError as error:
        return InputError(f"{item.where}: {error}")


def scores(answers: Sequence[tuple[Item, str]]) -> Scores:
    """Of each source, and of each kind of answer in it."""
    found: Scores = {}
    for (source, by), some in sorted(_groups(answers).items()):
        expected, given = [item.expected or "" for item, _ in some], [text for _, text in some]
        try:
            found[source, by] = tasks.score(by, expected, given)
        except InputError as error:
            found[source, by] = str(error)
    return found


def mistakes(answers: Sequence[tuple[Item, str]], found: Scores) -> list[dict[str, Any]]:
    """The rows with something wrong, as they were compared, those with most of it first."""
    wrong: list[dict[str, Any]] = []
    for key, some in _groups(answers).items():
        score = found[key]
        if not isinstance(score, Score) or not score.wrong:
            continue
        by = key[1]
        compared = tasks.TASKS[by.task].compared
        for (item, text), count in zip(some, score.wrong, strict=True):
            if count:
                told: dict[str, Any] = {"wrong": count, "row": item.number, "source": item.source}
                told["expected"] = compared(item.expected or "", by.language)
                told["given"] = compared(text, by.language)
                wrong.append(told)
    return sorted(wrong, key=lambda one: (-one["wrong"], one["row"]))


def _groups(
    answers: Sequence[tuple[Item, str]],
) -> dict[tuple[str, Rules], list[tuple[Item, str]]]:
    groups: dict[tuple[str, Rules], list[tuple[Item, str]]] = defaultdict(list)
    for item, response in answers:
        groups[item.source, item.rules].append((item, response))
    return groups


def check_scorable(items: Sequence[Item]) -> None:
    """Raise InputError where an answer could not be scored for want of a package. Answering takes
    hours, and comes first."""
    for by in {item.rules for item in items if item.rules.task != tasks.NONE}:
        tasks.score(by, ["1"], ["1"])


class Folder:
    """Where a run is written down.

    about    what the run is: JSON, in which a run that goes on must not differ
    errors   InputError where another run is, or what is there cannot be read or written
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self._about = folder, about
        self._settings, self._answers = folder / "run.json", folder / "answers.jsonl"
        try:
            if self._settings.exists():
                _check_same(self._settings, json.loads(self._settings.read_text("utf-8")), about)
            elif self._answers.exists():
                raise InputError(f"{self._answers}: of no run that is known: choose another folder")
            self._cut_torn_end()
        except InputError:
            raise
        except OSError as error:
            raise _unusable(error, folder) from error
        except ValueError as error:
            raise InputError(f"{self._settings}: not JSON ({error})") from error

    def done(self, items: Sequence[Item]) -> list[tuple[Item, str]]:
        """Those of the rows that have been answered, with their answers."""
        of = {item.number: item for item in items}
        if not self._answers.exists():
            return []
        found: dict[int, str] = {}
        for n, _, line in lines(self._answers):
            try:
                told = json.loads(line)
                found[int(told["row"])] = str(told["response"])
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{self._answers}:{n}: no answer of a run ({error!r})") from error
        return [(of[number], text) for number, text in found.items() if number in of]

    def add(self, answer: Answer) -> None:
        """Write an answer down, at once."""
        told = answer.item.told(answer.response, answer.finish_reason)
        try:
            self._begin()
            with self._answers.open("ab") as file:
                file.write(_json(told) + b"\n")
        except OSError as error:
            raise _unusable(error, self._answers) from error

    def finish(self, report: dict[str, Any], wrong: Sequence[dict[str, Any]]) -> list[Path]:
        """Write the scores, and the rows with mistakes; returns the files."""
        scored, told = self.folder / "scores.json", self.folder / "wrong.jsonl"
        try:
            self._begin()
            _write(told, b"".join(_json(one) + b"\n" for one in wrong))
            _write(scored, _json(report, indent=1) + b"\n")
        except OSError as error:
            raise _unusable(error, self.folder) from error
        return [scored, told]

    def _begin(self) -> None:
        if not self._settings.exists():
            _write(self._settings, _json(self._about, indent=1) + b"\n")

    def _cut_torn_end(self) -> None:
        """A line that was being written when the run was killed."""
        if self._answers.exists():
            content = self._answers.read_bytes()
            if content and not content.endswith(b"\n"):
                os.truncate(self._answers, content.rfind(b"\n") + 1)


def _check_same(file: Path, before: Any, now: dict[str, Any]) -> None:
    if not isinstance(before, dict):
        raise InputError(f"{file}: not the settings of a run: choose another folder")
    for key in now.keys() | before.keys():
        if before.get(key) != now.get(key):
            raise InputError(
                f"{file.parent}: holds answers of a run with another {key}"
                f" ({before.get(key)!r:.80}, now {now.get(key)!r:.80}): choose another folder"
            )


def _json(content: Any, indent: int | None = None) -> bytes:
    """In UTF-8; half of a pair of surrogates, which that has no place for, as JSON escapes it."""
    return json.dumps(content, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")


def _write(file: Path, content: bytes) -> None:
    aside = file.with_name(file.name + ".part")
    aside.write_bytes(content)
    os.replace(aside, file)


def _unusable(error: OSError, place: Path) -> InputError:
    return InputError(f"{place}: cannot be written to ({error.strerror})")


def _told(score: Score) -> dict[str, Any]:
    told = asdict(score)
    del told["wrong"]
    return told


def digest(file: Path) -> str:
    """Of a file's content, to know it again."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def table(found: Scores) -> list[str]:
    """Lines for a person."""
    names = [(" ".join(source.split()) or "(no source)", str(by)) for source, by in found]
    wide, broad = (max((len(name[i]) for name in names), default=0) for i in (0, 1))
    lines = []
    for (source, by), score in zip(names, found.values(), strict=True):
        lines.append(f"{source:{wide}}  {by:{broad}}  {score}")
    return lines


def report(found: Scores) -> list[dict[str, Any]]:
    """Scores as JSON."""
    return [
        {"source": source, **by._asdict()}
        | ({"not_scored": score} if isinstance(score, str) else _told(score))
        for (source, by), score in found.items()
    ]
