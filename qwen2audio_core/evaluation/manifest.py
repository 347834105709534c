"""Files of rows to be asked about, or of answers that are there already.

Rows have any form of rows.py; with an answer they can be scored. What "response" stands beside "gt"
or "audio_path", as in the official scripts' results and in those of harness.py, is an answer: it is
scored as it is, and no model is needed. There, whatever else a row holds is kept.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2audio_core import rows
from qwen2audio_core.errors import InputError
from qwen2audio_core.evaluation.tasks import NONE, Rules, rules
from qwen2audio_core.rows import Row
from qwen2audio_core.weights import few

# Of the forms of rows: `Item.told` puts gt, response and audio_path in their place.
FORMS = (
    *("audio", "audios", "messages", "conversations", "query", "history", "system"),
    *("prompt", "gt", "response", "chosen", "rejected", "rejected_response", "row"),
)


@dataclass(frozen=True)
class Item:
    """A row, and how what is answered to it will be scored."""

    number: int  # of the line, or of the item of an array, from 1
    raw: dict[str, Any]
    row: Row | None  # None where the answer is there
    prompt: str  # the last thing said to the model
    expected: str | None
    response: str | None
    source: str
    rules: Rules

    @property
    def where(self) -> str:
        return f"row {self.number}" if self.row is None else self.row.where

    def told(self, response: str, finish_reason: str) -> dict[str, Any]:
        """The row with its answer, as it is written down."""
        clips = self.row.clips if self.row is not None else []
        return {
            "row": self.number,
            "gt": self.expected,
            "response": response,
            "source": self.source,
            "audio_path": clips[0] if len(clips) == 1 else clips,
            "prompt": self.prompt,
            "finish_reason": finish_reason,
            **{key: value for key, value in self.raw.items() if key not in FORMS},
        }


def read(
    file: Path, task: str | None = None, language: str | None = None, limit: int | None = None
) -> list[Item]:
    """The rows of a file.

    task, language  as in tasks.rules, for all of them
    limit           only so many from the front
    errors          InputError for a file without rows, one of rows with answers and without, and
                    one for all the rows that cannot be used
    """
    found: list[Item] = []
    bad: list[str] = []
    if not file.exists():
        raise InputError(f"{file}: no such file")
    for line, _, content in rows.lines(file):
        if len(found) + len(bad) == limit:
            break
        where = rows.place_of(file, line)
        try:
            found.append(_item(_object(content, where), where, abs(line), file.parent))
        except InputError as error:
            bad.append(str(error))
    if bad:
        raise InputError("; ".join((bad[0], *_others(bad[1:]))))
    if not found:
        raise InputError(f"{file}: holds no rows")
    if len({item.response is None for item in found}) > 1:
        raise InputError(f"{file}: some rows have a response and some have none")
    return [_scored(item, task, language) for item in found]


def part_of(items: list[Item], part: str | None) -> list[Item]:
    """Part K of N of the rows, by "K/N"; all for None. InputError for anything else."""
    if part is None:
        return items
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    k, n = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= k <= n:
        raise InputError(f"part {part!r:.40} is not K/N, such as 1/4 to 4/4")
    if not items[k - 1 :: n]:
        raise InputError(f"part {part} of {len(items)} rows is empty")
    return items[k - 1 :: n]


def _others(lines: Sequence[str]) -> list[str]:
    return [f"and {len(lines):,} more bad rows: {few(list(lines))}"] if lines else []


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{where}: a {type(raw).__name__}, expected an object")
    return raw


def _item(raw: dict[str, Any], where: str, number: int, folder: Path) -> Item:
    by = Rules(NONE)
    if "response" in raw and ("gt" in raw or "audio_path" in raw):
        texts = {key: raw.get(key) for key in ("response", "gt", "source", "prompt")}
        for key, text in texts.items():
            if not isinstance(text, str | None) or (text is None and key == "response"):
                raise InputError(f"{where}: {key} is {text!r:.40}, expected a text")
        prompt, source = texts["prompt"] or "", texts["source"] or ""
        return Item(number, raw, None, prompt, texts["gt"], texts["response"], source, by)
    row = rows.parse(raw, where, folder, answered=False)
    prompt, expected = row.prompt, row.answer if raw.get("gt") is not None else None
    if row.messages:
        *before, last = row.messages
        if last["role"] == "assistant":
            expected = last["content"]
            last = before[-1] if before else {"role": "", "content": ""}
        if last["role"] != "user":
            raise InputError(f"{where}: no turn of the user's to answer")
        prompt = last["content"]
    return Item(number, raw, row, prompt, expected, None, row.source, by)


def _scored(item: Item, task: str | None, language: str | None) -> Item:
    if item.expected is None:
        if task not in (None, NONE):
            raise InputError(f"{item.where}: has no gt that an answer could be compared with")
        return item
    try:
        by = rules(item.prompt, task, language)
    except InputError as error:
        raise InputError(f"{item.where}: {error}") from error
    return Item(**{**vars(item), "rules": by})
