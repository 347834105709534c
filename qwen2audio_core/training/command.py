"""The commands `qwen2audio train`, and `rows` and `merge` for what comes before and after."""

from typing import Annotated, Any, Literal

import typer

from qwen2audio_core.options import Device, Overwrite


def train(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="jsonl files; a.jsonl@2 counts twice."),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="To begin with: hub id, folder, tiny or random.")
    ] = "Qwen/Qwen2-Audio-7B-Instruct",
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the run.")] = "run",
    stage: Annotated[
        Literal["pretrain", "sft", "dpo"],
        typer.Option(help="dpo learns from better and worse answers; the others from answers."),
    ] = "sft",
    valid: Annotated[str | None, typer.Option(help="jsonl to measure on meanwhile.")] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Read every row, also of --valid, print what the data is, and end; exit code 2:"
            " bad rows.",
        ),
    ] = False,
    show: Annotated[
        int,
        typer.Option(
            min=0, help="Print so many rows, token by token: what is trained on. And end."
        ),
    ] = 0,
    memory: Annotated[
        bool, typer.Option("--memory", help="Count the memory this run would need, and end.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="End after so many steps.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.001, help="End after so many minutes.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-4,
    warmup: Annotated[
        int, typer.Option(help="Steps until it is reached, in a line; then down as a cosine.")
    ] = 100,
    floor: Annotated[float, typer.Option(help="Rate at the end, as a part of the highest.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Of all matrices.")] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    batch_seconds: Annotated[float, typer.Option(help="Audio in a batch, padding counted.")] = 96.0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch, padding counted.")] = 8192,
    accumulate: Annotated[int, typer.Option(help="Batches in a step, of each process.")] = 1,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train adapters alone; the result is in PEFT's format.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Of the adapters; default 8.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="The adapters are scaled by alpha / rank; default 16.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the adapters' input.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Linear layers to adapt, module paths with *; default: the LLM's."),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Parameters to leave as they are: audio_tower.* and the like."),
    ] = None,
    mean_over: Annotated[
        Literal["tokens", "rows"],
        typer.Option(
            help="pretrain, sft: what the loss is the mean of. With rows a short answer counts as"
            " much as a long one."
        ),
    ] = "tokens",
    beta: Annotated[float, typer.Option(help="dpo: how dear it is to leave the start.")] = 0.1,
    dpo_sft: Annotated[
        float, typer.Option(help="dpo: weight of the better answers' own loss beside it.")
    ] = 0.0,
    ctc_weight: Annotated[
        float, typer.Option(help="Auxiliary loss on the encoder, for rows named asr...")
    ] = 0.0,
    sounds: Annotated[
        str | None, typer.Option(help="jsonl of when each speech sound is heard: another one.")
    ] = None,
    sounds_weight: Annotated[float, typer.Option(help="Of that loss.")] = 1.0,
    attend_weight: Annotated[
        float, typer.Option(help="Of a loss on the decoder: attend to where a token is said.")
    ] = 0.0,
    auxiliary_until: Annotated[
        float, typer.Option(help="Part of the run where all of these have sunk to 0.")
    ] = 1.0,
    listen_steps: Annotated[
        int, typer.Option(help="So many steps at first with the encoder's losses alone.")
    ] = 0,
    short_first: Annotated[int, typer.Option(help="So many batches in order of length.")] = 0,
    spec_augment: Annotated[
        bool, typer.Option("--spec-augment", help="Mask bands and stretches of the log-mels.")
    ] = False,
    noise: Annotated[float, typer.Option(help="Part of the clips to add noise to.")] = 0.0,
    speed: Annotated[float, typer.Option(help="Play clips faster or slower, 0.1: to 10 %.")] = 0.0,
    voice: Annotated[
        float,
        typer.Option(help="Move a clip's frequencies, tone; 0.1: up to 10 %, 4 dB rms."),
    ] = 0.0,
    workers: Annotated[int, typer.Option(help="Processes that prepare batches.")] = 0,
    float32: Annotated[bool, typer.Option("--float32", help="No bfloat16 arithmetic.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Activation checkpointing: less memory, slower.")
    ] = False,
    device: Device = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 2,
    keep_best: Annotated[
        bool,
        typer.Option("--keep-best", help="Also keep what had the lowest loss on --valid: best-..."),
    ] = False,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 500,
    eval_rows: Annotated[int, typer.Option(help="Rows to measure on.")] = 256,
    samples: Annotated[int, typer.Option(help="Answers to write at an evaluation.")] = 64,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Curves in OUT/tensorboard as well.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train on rows of audio and text, in the forms of ms-swift, LLaMA-Factory or the paper's.

    Without --model it is the published model of 8.4 billion parameters, 17 GB to download, that is
    trained. A run that was stopped goes on when the same command is given again. Several GPUs: the
    same command behind `torchrun --nproc-per-node N -m qwen2audio_core.cli`.

    Examples:

        qwen2audio train data.jsonl --check

        qwen2audio train data.jsonl --lora --steps 1000 --out run

        qwen2audio train pairs.jsonl --stage dpo --lora --steps 200 --out preference
    """
    from qwen2audio_core.errors import InputError
    from qwen2audio_core.training import data as rows
    from qwen2audio_core.training import inspect, loop
    from qwen2audio_core.training import lora as adapters

    for file in filter(None, (*data, valid)):
        rows.weighted(file)  # a file that is missing is the first thing to say
    patterns = tuple(target) if target else None
    of_adapters = {"rank": rank, "alpha": alpha, "dropout": dropout, "patterns": patterns}
    given: dict[str, Any] = {k: value for k, value in of_adapters.items() if value is not None}
    if target and not lora:
        raise InputError("--target names layers to adapt: give --lora with it")
    if given and not lora:
        raise InputError(f"--{next(iter(given))} is of adapters: give --lora with it")
    settings = loop.Settings(
        model=model,
        data=data,
        out=out,
        stage=stage,
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
        augment=rows.Augment(speed, noise, spec_augment, voice),
        workers=workers,
        seed=seed,
        adapter=adapters.Settings(**given) if lora else None,
        freeze=tuple(freeze or ()),
        mean_over=mean_over,
        ctc_weight=ctc_weight,
        sounds=sounds,
        sounds_weight=sounds_weight,
        attend_weight=attend_weight,
        auxiliary_until=auxiliary_until,
        listen_steps=listen_steps,
        dpo_beta=beta,
        dpo_sft=dpo_sft,
        bf16=not float32,
        recompute=recompute,
        device=device,
        save_every=save_every,
        keep=keep,
        keep_best=keep_best,
        eval_every=eval_every,
        eval_rows=eval_rows,
        samples=samples,
        tensorboard=tensorboard,
    )
    if check or show or memory:
        if memory:
            typer.echo(inspect.memory(settings))
        bad = 0
        if check:
            page, bad = inspect.statistics(settings)
            typer.echo(page)
        if show:
            typer.echo(inspect.masks(settings, show))
        if bad:
            raise InputError(f"bad rows: {bad:,}; training leaves out those it cannot read")
        return
    if steps is None and minutes is None:
        raise InputError("say when the run ends: --steps or --minutes")
    typer.echo(loop.train(settings))


def rows(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER_OR_TABLE",
            help="Clips and their texts: a.wav beside a.txt, LibriSpeech's folders, or a tsv or csv"
            " with columns such as path and sentence (Common Voice).",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for train.jsonl, valid.jsonl.")],
    prompt: Annotated[
        str, typer.Option(help="What the model is asked about every clip.")
    ] = "Detect the language and recognize the speech:",
    source: Annotated[str, typer.Option(help="Name of the set; asr...: transcripts.")] = "asr",
    valid_part: Annotated[float, typer.Option(help="Part of the clips to measure on.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of which clips these are.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace train.jsonl and valid.jsonl.")
    ] = False,
) -> None:
    """Make rows to train on from clips and texts.

    Examples:

        qwen2audio rows recordings --out data

        qwen2audio rows cv-corpus/sw/validated.tsv --out data
    """
    import json
    import random
    from pathlib import Path

    from qwen2audio_core.errors import InputError
    from qwen2audio_core.terminal import note
    from qwen2audio_core.training.make_rows import make

    if not 0 <= valid_part < 1:
        raise InputError(f"--valid-part is {valid_part}, expected 0 up to less than 1")
    files = [Path(out) / f"{name}.jsonl" for name in ("train", "valid")]
    for file in files:
        if file.exists() and not overwrite:
            raise InputError(
                f"{file}: is there already; choose another folder, or replace it with --overwrite"
            )
    if not f"{prompt}{source}".isprintable():
        raise InputError("the prompt or the source holds what is no text")
    found = list(make(Path(folder), prompt, source, note))
    if not found:
        raise InputError(f"{folder}: no clip of at most 30 s")
    random.Random(seed).shuffle(found)
    held = round(valid_part * len(found))
    if valid_part and len(found) > 1:
        held = max(1, held)  # of few clips too there is something to measure on
    held = min(held, len(found) - 1)
    Path(out).mkdir(parents=True, exist_ok=True)
    parts = list(zip(files, (found[held:], found[:held]), strict=True))
    aside = [file.with_suffix(".part") for file in files]
    try:
        for (file, part), path in zip(parts, aside, strict=True):  # noqa: B007
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            path.write_text("".join(lines), encoding="utf-8")
        for (file, part), path in zip(parts, aside, strict=True):
            if part:
                path.replace(file)
            else:
                file.unlink(missing_ok=True)  # one of before, whose rows may be among the others
    except OSError as error:
        raise InputError(f"{file}: cannot write it ({error.strerror})") from error
    finally:
        for path in aside:
            path.unlink(missing_ok=True)
    for file, part in parts:
        if part:
            hours = sum(row["seconds"] for row in part) / 3600
            typer.echo(f"{file}  {len(part)} rows, {hours:.2f} h")


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter, PEFT's format.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the whole model.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="What it belongs to; default: as the adapter says."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Add an adapter to its model: a checkpoint that every command takes as --model.

    Example:

        qwen2audio merge run/adapter --out my-model
    """
    from qwen2audio_core import assistant, weights
    from qwen2audio_core.errors import InputError
    from qwen2audio_core.training import lora

    base = model or lora.base_of(adapter)
    if not base:
        raise InputError(f"{adapter}: does not say what it belongs to, give --model")
    folder = assistant.find(base)
    weights.refuse_codes(folder, "which takes in no adapter; merge it into")
    whole = weights.load_model(folder)
    lora.load(whole, adapter)
    lora.write_merged(whole, out, folder, overwrite)
    typer.echo(out)
