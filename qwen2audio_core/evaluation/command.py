"""The command `qwen2audio evaluate`."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwen2audio_core.options import Device, Dtype, Model, NoPack, Penalty, Quantize
from qwen2audio_core.terminal import load, note, printable, quiet_libraries, write

if TYPE_CHECKING:
    from qwen2audio_core.evaluation.harness import Scores


def evaluate(
    file: Annotated[str, typer.Argument(metavar="ROWS", help="jsonl, or a JSON array of rows.")],
    model: Model = "tiny",
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", help="Folder for answers and scores; given again, it goes on there."
        ),
    ] = None,
    task: Annotated[
        Literal["asr", "translate", "label", "none"] | None,
        typer.Option(help="What answers are scored by; default: told by the published prompts."),
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="That answers are in, where prompts do not tell it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="Every N-th row from the K-th on: one part for each GPU."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at once.")] = 8,
    long: Annotated[
        Literal["error", "cut", "split"],
        typer.Option(help="What to do with a clip over 30 s; split is for turns alone."),
    ] = "error",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    repetition_penalty: Penalty = None,
    device: Device = None,
    dtype: Dtype = None,
    no_pack: NoPack = False,
    quantize: Quantize = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Ask about every row of a file, and score the answers as the published evaluation does.

    A row is {"audio", "prompt", "gt", "source"}, as in the published files, or of another form that
    `train` reads. Answers are greedy, with the checkpoint's repetition penalty. Speech is scored by
    word error rate, in Mandarin, Cantonese and Japanese by character error rate, translations by
    BLEU, labels to the letter; each source by itself, with the 95 % interval of a bootstrap. Rows
    that have a "response" beside their "gt" are scored as they are, without a model. Exit code 2: a
    row could not be answered.

    Examples:

        qwen2audio evaluate librispeech_eval.jsonl --model Qwen/Qwen2-Audio-7B --out librispeech

        qwen2audio evaluate others_answers.json --task asr --language en

    Several GPUs, each with --part 1/4 and so on and a folder of its own: put their answers.jsonl
    into one file, and evaluate that.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from qwen2audio_core.errors import InputError
    from qwen2audio_core.evaluation import harness, manifest
    from qwen2audio_core.holding import held

    place = Path(file)
    items = manifest.part_of(manifest.read(place, task, language, limit), part)
    harness.check_scorable(items)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if repetition_penalty is not None:
        settings["repetition_penalty"] = repetition_penalty
    about = {
        **{"rows": harness.digest(place), "model": model, "dtype": dtype, "quantize": quantize},
        **{"part": part, "batch_size": batch_size, "long": long},
        "generation": harness.PUBLISHED | settings,
    }
    if items[0].response is not None:
        if out is not None:
            raise InputError(f"{file}: the answers are there already, leave --out away")
        found = harness.scores([(item, item.response or "") for item in items])
        _tell(found, {"scores": harness.report(found)}, json_)
        return
    failed = cut = 0
    with nullcontext() if out is None else held(Path(out)):
        folder = None if out is None else harness.Folder(Path(out), about)
        done = folder.done(items) if folder is not None else []
        if done:
            note(f"{out}: {len(done):,} of {len(items):,} rows are answered there")
        answered = {item.number for item, _ in done}
        left = [item for item in items if item.number not in answered]
        if left:
            assistant = load(model, device, dtype, no_pack, quantize)
            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True, quiet=not sys.stderr.isatty()),
                transient=True,
            )
            options: dict[str, Any] = {"batch_size": batch_size, "long": long, "notice": note}
            with quiet_libraries(), bar as progress:
                rows = progress.add_task("rows", total=len(left))
                for answer in harness.ask(assistant, left, **options, **settings):
                    progress.advance(rows)
                    if answer.error:
                        failed += 1
                        note(f"error: {answer.error}")
                        continue
                    cut += answer.finish_reason == "length"
                    done.append((answer.item, answer.response))
                    if folder is not None:
                        folder.add(answer)
        found = harness.scores(done)
        report = {**about, "failed": failed, "scores": harness.report(found)}
        if folder is not None:
            files = folder.finish(report, harness.mistakes(done, found))
            note(f"wrote {printable(', '.join(map(str, files)))}")
    if cut:
        note(f"{cut:,} answers ran into --max-new-tokens {max_new_tokens}")
    if failed:
        note(f"without an answer, and so not in the scores: {failed:,} of {len(items):,} rows")
    _tell(found, report, json_)
    if failed:
        raise typer.Exit(2)


def _tell(found: "Scores", report: dict[str, Any], as_json: bool) -> None:
    from qwen2audio_core.evaluation.harness import table

    lines = [json.dumps(report)] if as_json else table(found)
    for line in lines:
        write(printable(line) + "\n")
