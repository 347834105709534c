"""Score the small model on its held-out set, and print the table that stands in its card.

    python scripts/evaluate_tiny.py --model DIR --data DIR [--json FILE] [--limit N]

DIR of --data is what make_tiny_data.py made; its test.jsonl has voices, a speech engine, sentences,
speeds and noise levels that the training never has. Answers are greedy, with the repetition penalty
of the model's own generation settings, which the report states.

Word error rate for English, character error rate for the other languages, both over all of a set's
words or characters together; accuracy for everything else: the share of answers that equal the
expected one. Both sides are normalised first: lower case, punctuation to spaces, and no spaces in
Mandarin, Cantonese and Japanese. Of the recognition without a language tag only the tag that the
model writes is scored. Of a conversation only the last answer is, the turns before it are given.
"""

import argparse
import json
import re
import sys
import time
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import jiwer

from qwen2audio_core import assistant as assistants
from qwen2audio_core import rows as forms
from qwen2audio_core.assistant import Assistant
from qwen2audio_core.chat import Prompt
from qwen2audio_core.errors import InputError

CLIP = "<|audio_bos|><|AUDIO|><|audio_eos|>"
UNSPACED = ("zh", "yue", "ja")
KEYS = ("task", "subtask", "set", "language", "seconds")  # of every row
MAX_NEW_TOKENS = 64
# Sets of English speech that are not espeak's: festival, and flite's voice that training lacks.
UNSEEN = {"engine": "wer.unseen_engine", "flite": "wer.unseen_voice_flite"}
Row = dict[str, Any]


def normalise(text: str, unspaced: bool = False) -> str:
    """Lower case, no tags, signs and punctuation to spaces; without any space for `unspaced`."""
    text = re.sub(r"<\|.*?\|>", " ", text)
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text)
    return ("" if unspaced else " ").join(text.split())


def tag(text: str) -> str:
    """The first language tag of an answer, "" where there is none."""
    found = re.search(r"<\|([a-z]+)\|>", text)
    return found[1] if found else ""


def error_rate(rows: list[Row], answers: list[str], unit: str) -> float:
    """Sum of edits over sum of lengths: in words ("wer") or characters ("cer")."""
    unspaced = [row["language"] in UNSPACED for row in rows]
    wanted = [normalise(expected(row), no) for row, no in zip(rows, unspaced, strict=True)]
    given = [normalise(text, no) for text, no in zip(answers, unspaced, strict=True)]
    return (jiwer.wer if unit == "wer" else jiwer.cer)(wanted, given)


def is_right(row: Row, answer: str) -> bool:
    """Whether an answer counts as right."""
    wanted = expected(row)
    if row["task"] == "language":
        return tag(answer) == tag(wanted)
    return normalise(answer) == normalise(wanted)


def expected(row: Row) -> str:
    return row["messages"][-1]["content"] if "messages" in row else row["gt"]


def encode(assistant: Assistant, row: Row) -> Prompt:
    """A row of either form as the model is asked it, without the last answer."""
    if "messages" not in row:
        return assistant.encode_raw(CLIP + row["prompt"], row["audio"])
    return assistant.encode(turns(row))


def turns(row: Row) -> list[dict[str, Any]]:
    """A row's conversation without its last answer, clips in the place of their <audio>."""
    clips = ({"type": "audio", "audio": clip} for clip in row["audios"])
    return forms.turns(row["messages"][:-1], clips)


def answer(
    assistant: Assistant, rows: list[Row], batch: int, answers: int = 1, **options: Any
) -> list[list[str]]:
    """The model's answers to each row, tags included; rows of like length go together."""
    order = sorted(range(len(rows)), key=lambda i: ("messages" in rows[i], rows[i]["seconds"]))
    given: list[list[str]] = [[] for _ in rows]
    ends = set(assistant.settings.eos_token_ids)
    began = time.monotonic()
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        prompts = [encode(assistant, rows[i]) for i in some]
        replies = assistant.stream_prompts(prompts, answers, **options).finished()
        for n, reply in enumerate(replies):
            ids = [token for token in reply.ids if token not in ends]
            given[some[n // answers]].append(assistant.tokenizer.decode(ids, skip_special=False))
        done = min(first + batch, len(rows))
        left = (time.monotonic() - began) * (len(rows) - done) / done
        print(f"\r{done:,} of {len(rows):,}, {left:.0f} s left ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return given


def score(rows: list[Row], answers: list[str]) -> dict[str, dict[str, float]]:
    """{"wer.en": {"value", "rows"}, "cer.zh": ..., "accuracy.TASK": ..., "...TASK.PART": ...}"""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["task"] == "asr" and row["set"] in UNSEEN:
            groups[UNSEEN[row["set"]]].append(i)
        elif row["task"] == "asr_long":
            groups["wer.en_long" if row["language"] == "en" else "cer.others_long"].append(i)
        elif row["task"] == "asr":
            groups[f"{'wer' if row['language'] == 'en' else 'cer'}.{row['language']}"].append(i)
        else:
            engine = "_unseen_engine" if row["set"] == "engine" else ""
            groups[f"accuracy.{row['task']}{engine}"].append(i)
            if row["subtask"] and not engine:
                groups[f"accuracy.{row['task']}.{row['subtask']}"].append(i)
            elif row["task"] == "language":
                groups[f"accuracy.language.{row['language']}"].append(i)
    scores = {}
    for name, members in sorted(groups.items()):
        if name.startswith("accuracy"):
            value = sum(is_right(rows[i], answers[i]) for i in members) / len(members)
        else:
            some = [rows[i] for i in members]
            value = error_rate(some, [answers[i] for i in members], name.partition(".")[0])
        scores[name] = {"value": round(value, 4), "rows": len(members)}
    return scores


TITLES = {
    "wer.en": "English, word error rate",
    "cer.zh": "Mandarin, character error rate",
    "cer.yue": "Cantonese, character error rate",
    "cer.fr": "French, character error rate",
    "cer.it": "Italian, character error rate",
    "cer.es": "Spanish, character error rate",
    "cer.de": "German, character error rate",
    "cer.ja": "Japanese, character error rate",
    "wer.unseen_engine": "English by an engine never heard (festival), word error rate",
    "wer.unseen_voice_flite": "English by a voice of flite never heard, word error rate",
    "wer.en_long": "English, clips of 4 to 26 s, word error rate",
    "cer.others_long": "the other languages, clips of 4 to 26 s, character error rate",
    "accuracy.asr_silence": "recognition of silence and noise: no word invented",
    "accuracy.language": "which language, accuracy",
    "accuracy.translate_en": "translated into English, exactly right",
    "accuracy.translate_zh": "translated into Mandarin, exactly right",
    "accuracy.sounds": "sounds and music, exactly right",
    "accuracy.gender": "a man's or a woman's voice, accuracy",
    "accuracy.manner": "fast, slow, high, low, whispered, accuracy",
    "accuracy.voice_chat": "voice chat, exactly right",
    "accuracy.voice_chat_unseen_engine": "voice chat by an engine never heard, exactly right",
    "accuracy.analysis": "written questions about a clip, exactly right",
    "accuracy.several_clips": "turns about several clips, exactly right",
    "accuracy.silence": "silence and noise, exactly right",
}


def table(scores: dict[str, dict[str, float]], details: bool = False) -> str:
    """A markdown table; with `details` also the parts of each task."""
    lines = ["| held-out set | rows | result |", "|---|---:|---:|"]
    for name, title in TITLES.items():
        if name not in scores:
            continue
        found = scores[name]
        lines.append(f"| {title} | {found['rows']:,} | {found['value']:.1%} |")
        parts = [part for part in scores if part.startswith(name + ".")]
        for part in parts if details else ():
            found = scores[part]
            what = part.rpartition(".")[2].replace("_", " ")
            lines.append(f"| - {what} | {found['rows']:,} | {found['value']:.1%} |")
    return "\n".join(lines)


def read(path: Path) -> list[Row]:
    """The rows of a jsonl, their clips by paths that hold from anywhere."""
    folder, rows = path.resolve().parent, []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"{path}: cannot read it ({error.strerror}); make it with scripts/make_tiny_data.py"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            own = ("messages", "audios") if "messages" in row else ("audio", "prompt", "gt")
            if lacking := {*KEYS, *own} - row.keys():
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
            if "audio" in row:
                row["audio"] = str(folder / row["audio"])
            else:
                row["audios"] = [str(folder / clip) for clip in row["audios"]]
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: no row of make_tiny_data.py ({error})"
            ) from error
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def at_least_one(word: str) -> int:
    if (number := int(word)) < 1:
        raise ValueError
    return number


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint's folder")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--file", default="test.jsonl", help="which rows; default test.jsonl")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="only the first N rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write every answer here")
    parser.add_argument(
        "--batch", type=at_least_one, default=32, help="rows answered at once; default 32"
    )
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--details", action="store_true", help="also the parts of each task")
    args = parser.parse_args(argv)
    try:
        rows = read(args.data / args.file)[: args.limit]
        for path in (args.json, args.answers):
            if path and not path.absolute().parent.is_dir():
                raise InputError(f"{path}: there is no such folder to write into")
        assistant = assistants.load(args.model, device=args.device)
        options = {"greedy": True, "max_new_tokens": MAX_NEW_TOKENS}
        answers = [given for (given,) in answer(assistant, rows, args.batch, **options)]
    except InputError as error:
        print(f"evaluate_tiny: {error}", file=sys.stderr)
        return 2
    scores = score(rows, answers)
    penalty = assistant.settings.repetition_penalty
    settings = f"greedy, repetition penalty {penalty:g}, at most {MAX_NEW_TOKENS} new tokens"
    print(table(scores, args.details))
    print(f"\n{len(rows):,} rows; {settings}; {args.model}")
    if args.json:
        figures = {name: found["value"] for name, found in scores.items()}
        counts = {name: found["rows"] for name, found in scores.items()}
        report = {**figures, "rows": counts, "settings": settings}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.answers:
        with args.answers.open("w", encoding="utf-8") as file:
            for row, given in zip(rows, answers, strict=True):
                told = {"right": is_right(row, given), "expected": expected(row), "answer": given}
                file.write(json.dumps({**told, **row}, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
