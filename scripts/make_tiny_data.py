"""Make the data of the small model, for training and test: wav files, and jsonl that names them.

    python scripts/make_tiny_data.py --out DIR                       everything
    python scripts/make_tiny_data.py --out DIR --stage pretrain      one stage alone
    python scripts/make_tiny_data.py --out DIR --stage pretrain --hours 20
    python scripts/make_tiny_data.py --out DIR --part 0.01           a little, to try things

    pretrain.jsonl  {"audio", "prompt", "gt", "source"}: the official form, for the base model
    words.jsonl     the same form: words in no order, to be heard and not guessed
    engines.jsonl   both forms: what two other engines say, RHVoice and SVOX Pico. Left out where
                    their programs are not installed (Debian: non-free)
    drills.jsonl    both forms: short answers that hang on one thing, such as whose voice is louder
    sft.jsonl       {"messages", "audios"}: <audio> in the messages stands for each clip, in order
    valid.jsonl     both forms; voices of the training, sentences of its own drawing. Also by form,
                    as valid-pretrain.jsonl and valid-sft.jsonl
    test.jsonl      both forms; voices, a speech engine, sentences, speeds and noise levels that the
                    training never has
    texts.txt       every prompt and answer of pretrain, words and sft, for the tokenizer
    phones.jsonl    {"audio", "phones", "end"}: which sound of speech is heard when in the clips of
                    pretrain.jsonl and words.jsonl that are one utterance of espeak-ng, for
                    `train --sounds`

Every row also has "task", "subtask", "language", "set" and "seconds" (of all its clips). Paths are
relative to DIR. A run that was broken off goes on where it stopped. The same seed makes the same
data. Needs espeak-ng and flite, and for the test festival with its voice cmu_us_slt_arctic_hts.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
import wave
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker, before numpy is there

import numpy as np

from tiny_data import render, speech, tasks

RATE = 16_000
FOLDER = 1_000  # rows whose clips, four at most, share a folder
CHUNK = 400  # rows made at a time; what a broken-off run loses, for each worker
ROWS = {
    "pretrain": 50_000,
    "words": 14_000,
    "engines": 8_000,
    "drills": 12_000,
    "sft": 60_000,
    "valid": 600,
    "test": 2_620,
}
# Rows made of any part, however small; the test then has every task.
LEAST = {
    "pretrain": 100,
    "words": 100,
    "engines": 100,
    "drills": 100,
    "sft": 100,
    "valid": 32,
    "test": 131,
}
DRAW = {
    "pretrain": tasks.pretrain,
    "sft": tasks.sft,
    "valid": tasks.valid,
    "test": tasks.test,
    "pairs": tasks.pairs,  # made by make_tiny_pairs.py
    "words": tasks.words,
    "engines": tasks.engines,
    "drills": tasks.drills,
}
SEEDS = {stage: i for i, stage in enumerate(DRAW)}

ENGINES = ("RHVoice-test", "pico2wave")  # programs of the stage "engines"

Job = tuple[str, int, int, int, Path]  # stage, seed, first row, one past the last, folder


def part_of(job: Job) -> Path:
    """Where the rows of a job are listed, once all their clips are there."""
    stage, seed, first, last, out = job
    return out / "parts" / f"{stage}-{seed}-{first:07}-{last:07}.jsonl"


def make_chunk(job: Job) -> tuple[int, float]:
    """Make the clips of some rows, then the jsonl that lists them. Returns rows and seconds."""
    stage, seed, first, last, out = job
    folder = out / "wav" / stage / f"{first // FOLDER:04}"
    part = part_of(job)
    folder.mkdir(parents=True, exist_ok=True)
    lines, total = [], 0.0
    for i in range(first, last):
        row = DRAW[stage](i, seed)
        paths, seconds, heard = [], 0.0, []
        for n, clip in enumerate(row["clips"]):
            waveform, heard = render.render_with_sounds(clip, seed=hash_of(stage, seed, i, n))
            path = folder / f"{i:07}{chr(ord('a') + n) if n else ''}.wav"
            write(path, waveform)
            paths.append(str(path.relative_to(out)))
            seconds += len(waveform) / RATE
        written = as_written(row, paths, seconds)
        if heard and len(paths) == 1 and stage in ("pretrain", "words"):
            written["phones"] = [[name or "_", start] for name, start in heard]
        lines.append(json.dumps(written, ensure_ascii=False))
        total += seconds
    text = "\n".join(lines) + "\n"
    new = part.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.rename(part)
    return len(lines), total


def write(path: Path, waveform: np.ndarray) -> None:
    """A wav file of 16 bits. soundfile would wait for the disk after each."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((waveform * 32767).round().astype("<i2").tobytes())


def hash_of(stage: str, seed: int, i: int, n: int) -> int:
    """A seed for the sound of a clip."""
    return ((seed * len(SEEDS) + SEEDS[stage]) * 10_000_000 + i) * 8 + n


def as_written(row: dict, paths: list[str], seconds: float) -> dict:
    """A row as the files hold it."""
    about = {key: row[key] for key in ("task", "subtask", "language", "set")}
    about["seconds"] = round(seconds, 2)
    if "messages" in row:
        return {"messages": row["messages"], "audios": paths, **about}
    return {
        "audio": paths[0],
        "prompt": row["prompt"],
        "gt": row["gt"],
        "source": row["source"],
        **about,
    }


def read(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def texts_of(row: dict) -> list[str]:
    """The lines of a row that a tokenizer should know."""
    if "messages" in row:
        lines = [message["content"].replace("<audio>", "") for message in row["messages"]]
    else:
        lines = [row["prompt"], row["gt"]]
    return [line for line in lines if line]


def make(out: Path, stage: str, rows: int, seed: int, workers: int, hours: float | None) -> None:
    """Make one stage, and its jsonl when all of it is there."""
    (out / "parts").mkdir(parents=True, exist_ok=True)
    final = out / f"{stage}.jsonl"
    if final.exists():
        print(f"{stage}: {final} is there")
        return
    jobs = [(stage, seed, i, min(i + CHUNK, rows), out) for i in range(0, rows, CHUNK)]
    left = [job for job in jobs if not part_of(job).exists()]
    stated = sum(row["seconds"] for job in jobs if job not in left for row in read(part_of(job)))
    began, made, seconds = time.monotonic(), 0, 0.0
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for count, sound in pool.imap(make_chunk, left):
            made += count
            seconds += sound
            spent = time.monotonic() - began
            done = rows - sum(job[3] - job[2] for job in left) + made
            rest = (rows - done) * spent / made
            print(
                f"\r{stage}: {done:,} of {rows:,} rows, {(stated + seconds) / 3600:.2f} h of sound,"
                f" {made / spent:.0f} rows/s, {rest / 60:.1f} min left ",
                end="",
                flush=True,
            )
            if hours is not None and (stated + seconds) / 3600 >= hours:
                break
    if made:
        print()
    tasks_made: Counter[str] = Counter()
    new = final.with_suffix(".jsonl.part")
    heard = []
    with new.open("w", encoding="utf-8") as file:
        for path in filter(Path.exists, map(part_of, jobs)):
            for row in read(path):
                tasks_made[row["task"]] += 1
                phones = row.pop("phones", None)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if phones:
                    about = {"audio": row["audio"], "phones": phones, "end": phones[-1][1]}
                    heard.append(json.dumps(about, ensure_ascii=False) + "\n")
    if heard:
        known = out / "phones.jsonl"
        others = known.read_text("utf-8").splitlines(keepends=True) if known.exists() else []
        own = json.dumps(f"wav/{stage}/")[:-1]
        heard = [line for line in others if own not in line] + heard
        known.with_suffix(".new").write_text("".join(heard), encoding="utf-8")
        known.with_suffix(".new").rename(known)
    new.rename(final)
    if stage == "valid":
        rows_of = {"pretrain": "prompt", "sft": "messages"}
        for form, key in rows_of.items():
            lines = [json.dumps(row, ensure_ascii=False) for row in read(final) if key in row]
            (out / f"valid-{form}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts = ", ".join(f"{task} {count:,}" for task, count in tasks_made.most_common())
    print(f"{stage}: {sum(tasks_made.values()):,} rows in {final} ({counts})")


def write_texts(out: Path, rows: dict[str, int], seed: int) -> None:
    """texts.txt: what the rows of the training stages ask and answer. Needs no clips."""
    new = out / "texts.txt.part"
    with new.open("w", encoding="utf-8") as file:
        for stage in ("pretrain", "words", "sft"):
            for i in range(rows[stage]):
                file.writelines(line + "\n" for line in texts_of(DRAW[stage](i, seed)))
    new.rename(out / "texts.txt")


def check_engines(wanted: list[str]) -> None:
    """Let each engine speak a word, so that one that is missing is told of before all the work."""
    if not wanted:
        return
    names = {"espeak", "flite"}
    if "engines" in wanted:
        names |= {"rhvoice", "pico"}
    if "test" in wanted:
        names.add("festival")
    for voice in speech.voices("en", "train") + speech.voices("en", "test"):
        if voice.engine in names:
            names.remove(voice.engine)
            speech.speak("ten", voice)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--stage", choices=ROWS, help="only this one; default: all")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of each stage made")
    parser.add_argument("--hours", type=float, metavar="H", help="stop a stage at so much sound")
    parser.add_argument("--part", type=float, default=1.0, metavar="P", help="so much of all rows")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args(argv)
    if not 0 < args.part <= 1:
        parser.error(f"--part is {args.part}: above 0 and at most 1")
    out = args.out.resolve()
    wanted = [stage for stage in ROWS if args.stage in (None, stage)]
    missing = [program for program in ENGINES if not shutil.which(program)]
    if args.stage is None and missing:
        print(f"engines: left out, not installed: {', '.join(missing)}")
        wanted.remove("engines")
    counts = {stage: max(LEAST[stage], round(args.part * rows)) for stage, rows in ROWS.items()}
    if args.rows:
        counts = dict.fromkeys(counts, args.rows)
    try:
        check_engines([stage for stage in wanted if not (out / f"{stage}.jsonl").exists()])
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "texts.txt").exists():
            write_texts(out, counts, args.seed)
        for stage in wanted:
            make(out, stage, counts[stage], args.seed, args.workers, args.hours)
    except speech.SpeechError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
