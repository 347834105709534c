"""Recordings and their texts, as they lie on disks, to rows of the official form (../rows.py).

    a.wav beside a.txt                    a folder of anybody's own
    1-2-0003.flac, 1-2.trans.txt          LibriSpeech: lines of a clip's name and its text
    a table with a head line, tsv or csv  Common Voice (path, sentence), folders of Hugging Face's
                                          datasets (file_name, transcription)

Everything that is wrong is gathered and told at once: reading ten hours takes a while.
"""

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qwen2audio_core import audio, audio_files
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import MAX_SAMPLES, MAX_SECONDS, SAMPLE_RATE, clip_lengths
from qwen2audio_core.weights import few

TABLES = {".tsv": "\t", ".csv": ","}
CLIPS = ("path", "file_name", "audio", "file", "filename", "wav")  # a table's columns
TEXTS = ("sentence", "transcription", "text", "transcript")
LINES = ".trans.txt"
Notice = Callable[[str], object]


class Said(NamedTuple):
    """A clip and what is said in it."""

    clip: Path
    text: str


def make(place: Path, prompt: str, source: str, notice: Notice) -> Iterator[dict[str, Any]]:
    """Rows of a folder or a table.

    notice  called with a line on texts without a clip, and at the end on clips over 30 s
    errors  InputError where there is nothing, one for all the clips whose text is missing, empty or
            not UTF-8, and one for all that cannot be heard
    """
    is_table = place.suffix.lower() in TABLES and place.is_file()
    found = _of_table(place) if is_table else _of_folder(place, notice)
    folder = place.parent if is_table else place
    long: list[str] = []
    broken: list[str] = []
    first = ""  # what is wrong with the first of them
    for clip, text in found:
        try:
            samples = len(audio.load(str(clip)))
            if not clip_lengths(min(samples, MAX_SAMPLES)).audio_tokens:
                raise InputError(f"{clip}: too short to be heard")
        except InputError as error:
            first = first or str(error)
            broken.append(_name(clip, folder))
            continue
        if samples > MAX_SAMPLES:
            long.append(_name(clip, folder))
        elif not broken:
            yield {
                "audio": str(clip.resolve()),
                "prompt": prompt,
                "gt": text,
                "source": source,
                "seconds": round(samples / SAMPLE_RATE, 3),
            }
    if broken:
        others = f"; and {len(broken) - 1} more: {', '.join(broken[1:])}" if broken[1:] else ""
        raise InputError(f"{first}{others}")
    if long:
        notice(
            f"{place}: left out, {len(long)} clips over {MAX_SECONDS} s, cut them into pieces:"
            f" {few(long)}"
        )


def _of_folder(folder: Path, notice: Notice) -> list[Said]:
    if not folder.is_dir():
        what = "not a folder, nor a table (tsv, csv)" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}")
    files = sorted(
        path
        for path in folder.rglob("*")
        # Not what macOS leaves beside the files it packs.
        if not path.is_dir() and not path.name.startswith(".") and "__MACOSX" not in path.parts
    )
    clips = [path for path in files if path.suffix.lower() in audio_files.SUFFIXES]
    if not clips:
        raise InputError(
            f"{folder}: no clip here, looked for {', '.join(sorted(audio_files.SUFFIXES))}"
        )
    texts: dict[Path, Path] = {}  # of a clip, without the ending
    lines: dict[Path, str] = {}
    bad = _Faults(folder)
    for file in files:
        if file.name.endswith(LINES):
            try:
                for line in _read(file).splitlines():
                    name, _, text = line.partition(" ")
                    lines[file.parent / name] = text
            except InputError as error:
                bad.add(str(error), file)
        elif file.suffix in (".txt", ".TXT"):
            texts[file.with_suffix("")] = file
    owners = Counter(clip.with_suffix("") for clip in clips)
    found = []
    for clip in clips:
        key = clip.with_suffix("")
        if owners[key] > 1:
            bad.add("a clip of the same name", clip)
        if not _is_unicode(clip):
            bad.add("a name that is not UTF-8", clip)
        elif key in texts:
            try:
                found.append(Said(clip, _text(_read(texts[key]))))
            except InputError as error:
                bad.add(str(error), texts[key])
        elif key in lines:
            try:
                found.append(Said(clip, _text(lines[key])))
            except InputError as error:
                bad.add(str(error), clip)
        else:
            bad.add("no .txt of the same name", clip)
    bad.tell(f"of {len(clips)} clips, ")
    for kind, keys in ((".txt", texts), (f"lines of {LINES}", lines)):
        alone = [texts.get(key, key) for key in keys if key not in owners]
        if alone:
            names = few([_name(path, folder) for path in alone])
            notice(f"{folder}: left out, {len(alone)} {kind} without a clip of that name: {names}")
    return found


def _of_table(file: Path) -> list[Said]:
    # Common Voice writes quotation marks as they are.
    plain = file.suffix.lower() == ".tsv"
    form: Any = {"quoting": csv.QUOTE_NONE} if plain else {"strict": True}
    found, bad = [], _Faults(file)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, delimiter=TABLES[file.suffix.lower()], **form)
            columns = {name.strip().lower(): name for name in table.fieldnames or ()}
            named = next((columns[name] for name in CLIPS if name in columns), None)
            said = next((columns[name] for name in TEXTS if name in columns), None)
            if named is None or said is None:
                raise InputError(
                    f"{file}: its columns are {', '.join(columns) or 'none'}; expected one of"
                    f" {', '.join(CLIPS)} for the clip and one of {', '.join(TEXTS)}"
                )
            for row in table:
                name = (row[named] or "").strip()
                places = (file.parent / name, file.parent / "clips" / name)
                clip = next((place for place in places if name and _is_file(place)), None)
                where = f"line {table.line_num}"
                if clip is None:
                    missing = f"{where} (no such clip as {name or 'an empty name'})"
                    bad.add("no clip there", Path(missing))
                    continue
                try:
                    found.append(Said(clip, _text(row[said] or "")))
                except InputError as error:
                    bad.add(str(error), Path(where))
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason})") from error
    except csv.Error as error:
        raise InputError(f"{file}: no table ({error})") from error
    except OSError as error:
        raise InputError(f"{file}: cannot read it ({error.strerror})") from error
    bad.tell("of its rows, ")
    if not found:
        raise InputError(f"{file}: no rows below the head line")
    return found


class _Faults:
    """What is wrong, and with which files or lines."""

    def __init__(self, place: Path):
        self._place = place
        self._found: dict[str, list[str]] = {}

    def add(self, what: str, where: Path) -> None:
        self._found.setdefault(what, []).append(_name(where, self._place))

    def tell(self, begin: str) -> None:
        """InputError, if there is anything."""
        if self._found:
            several = (
                f"{len(names)} with {what}: {few(names)}" for what, names in self._found.items()
            )
            raise InputError(f"{self._place}: {begin}{'; '.join(several)}")


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("a text that is not UTF-8") from error
    except OSError as error:
        raise InputError(f"a text that cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise InputError("a text that is not UTF-8")
    return text


def _text(text: str) -> str:
    """On one line."""
    text = " ".join(text.split())
    if not text:
        raise InputError("an empty text")
    return text


def _name(path: Path, folder: Path) -> str:
    """Below the folder; one that is not UTF-8 with marks in the place of what is not."""
    shown = path.relative_to(folder) if path.is_relative_to(folder) else path
    return os.fsencode(shown).decode(errors="replace")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name at all: too long, or with a null in it
        return False


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
