"""Preference pairs out of the small model's own wrong answers, for the DPO stage.

    python scripts/make_tiny_pairs.py --model DIR --data DIR --out pairs.jsonl

Training's kind of rows, of all tasks and both forms, drawn anew (DIR/pairs.jsonl, made when it is
not there), are answered several times at a temperature. A wrong answer becomes the worse one beside
the right one: a wrong word, an answer that does not end, words where there is only silence or
noise. Rows that are answered right each time make no pair. The forms are `qwen2audio train`'s:

    {"messages": [..., {"role": "assistant", "content": right}], "rejected_response": wrong,
     "audios": [path, ...], "task": ...}
    {"audio": path, "prompt": ..., "gt": right, "rejected": wrong, "task": ...}
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import evaluate_tiny
import make_tiny_data
from evaluate_tiny import Row, expected, is_right, normalise

from qwen2audio_core import assistant as assistants
from qwen2audio_core.errors import InputError
from tiny_data.texts import LANGUAGES

NO_LANGUAGE = rf"<\|(?!(?:{'|'.join(LANGUAGES)})\|>).*?\|>"


def pair(row: Row, answers: list[str]) -> Row | None:
    """A row with the wrong answer that was given most often, the longest of those; None if none."""
    chat = "messages" in row
    wrong: Counter[str] = Counter()
    for answer in answers:
        # A language's tag begins an answer to an official prompt; other special tokens are noise.
        text = re.sub(r"<\|.*?\|>" if chat else NO_LANGUAGE, "", answer).strip()
        if not text or (is_right(row, text) and normalise(text) == normalise(expected(row))):
            continue
        wrong[text] += 1
    if not wrong:
        return None
    rejected = max(wrong, key=lambda text: (wrong[text], len(normalise(text))))
    return {**row, "rejected_response" if chat else "rejected": rejected}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the model after SFT")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rows", type=int, default=2_000, help="rows to answer; default 2000")
    parser.add_argument("--answers", type=int, default=3, help="answers to each; default 3")
    parser.add_argument("--temperature", type=float, default=0.7, help="default 0.7")
    parser.add_argument("--batch", type=int, default=32, help="rows answered at once; default 32")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args(argv)
    data = args.data.resolve()
    make_tiny_data.make(data, "pairs", args.rows, args.seed, args.workers, None)
    try:
        rows = evaluate_tiny.read(data / "pairs.jsonl")[: args.rows]
        assistant = assistants.load(args.model, device=args.device)
        answers = evaluate_tiny.answer(
            assistant,
            rows,
            args.batch,
            answers=args.answers,
            temperature=args.temperature,
            top_p=0.95,
            top_k=0,
            max_new_tokens=evaluate_tiny.MAX_NEW_TOKENS,
            seed=args.seed,
        )
    except InputError as error:
        print(f"make_tiny_pairs: {error}", file=sys.stderr)
        return 2
    made = [found for row, given in zip(rows, answers, strict=True) if (found := pair(row, given))]
    new = args.out.with_suffix(".part")
    new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    new.rename(args.out)
    counts = ", ".join(f"{task} {n:,}" for task, n in Counter(r["task"] for r in made).items())
    print(f"{len(made):,} pairs of {len(rows):,} rows in {args.out} ({counts})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
