"""The command `qwen2audio train`."""

from typing import Annotated

import typer


def train(
    data: Annotated[list[str], typer.Argument(help="Rows to learn from, jsonl files.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub id to begin with.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the run.")],
    valid: Annotated[str | None, typer.Option(help="Rows to measure on, a jsonl file.")] = None,
    steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="End after so many minutes.")] = None,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-4,
    warmup: Annotated[int, typer.Option(help="Steps until it is reached.")] = 100,
    floor: Annotated[float, typer.Option(help="Rate at the end, as a part of the highest.")] = 0.0,
    weight_decay: float = 0.01,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    batch_seconds: Annotated[float, typer.Option(help="Audio in a batch.")] = 96.0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch.")] = 8192,
    accumulate: Annotated[int, typer.Option(help="Batches in a step.")] = 1,
    short_first: Annotated[int, typer.Option(help="Batches to take in order of length.")] = 0,
    ctc_weight: Annotated[float, typer.Option(help="Of the auxiliary loss on the encoder.")] = 0.0,
    ctc_until: Annotated[float, typer.Option(help="Part of the run where it ends.")] = 1.0,
    spec_augment: Annotated[
        bool, typer.Option("--spec-augment", help="Mask the log-mels.")
    ] = False,
    float32: Annotated[bool, typer.Option("--float32", help="No bfloat16 arithmetic.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 2,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 500,
    eval_rows: int = 256,
    samples: Annotated[int, typer.Option(help="Answers to write at an evaluation.")] = 64,
    seed: int = 0,
) -> None:
    """Train on rows of audio and text. The same command goes on where a run was stopped."""
    from qwen2audio_core.errors import InputError
    from qwen2audio_core.training import loop

    if steps is None and minutes is None:
        raise InputError("say when the run ends: --steps or --minutes")
    settings = loop.Settings(
        model=model,
        data=data,
        out=out,
        valid=valid,
        steps=steps,
        minutes=minutes,
        lr=lr,
        warmup=warmup,
        floor=floor,
        weight_decay=weight_decay,
        clip=clip,
        batch_seconds=batch_seconds,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        short_first=short_first,
        ctc_weight=ctc_weight,
        ctc_until=ctc_until,
        masking=spec_augment,
        bf16=not float32,
        save_every=save_every,
        keep=keep,
        eval_every=eval_every,
        eval_rows=eval_rows,
        samples=samples,
        seed=seed,
    )
    typer.echo(loop.train(settings))
