"""The command `qwen2audio quantize`: a checkpoint's language model in 8 or 4 bits a weight."""

import sys
from typing import Annotated

import typer

from qwen2audio_core.options import Model, Overwrite
from qwen2audio_core.terminal import note, printable, write


def quantize(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write, new or empty.")],
    model: Model = "tiny",
    bits: Annotated[int, typer.Option(help="Of a weight: 4, or 8 which is closer.")] = 4,
    group: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale in 4 bits: 128 (default), 64 or 32."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint anew with its language model in 8 or 4 bits a weight.

    The result is a folder for --model, here alone: transformers does not read it. It is read and
    written tensor by tensor, with the memory of the largest one.

    Example:

        qwen2audio quantize --model Qwen/Qwen2-Audio-7B-Instruct --bits 4 qwen2-audio-int4
    """
    from rich.console import Console
    from rich.progress import Progress

    from qwen2audio_core.assistant import find
    from qwen2audio_core.errors import InputError
    from qwen2audio_core.info import describe, in_bytes
    from qwen2audio_core.quantize import Scheme
    from qwen2audio_core.saving import save_quantised

    if bits == 8 and group is not None:
        raise InputError("--group is for --bits 4: in 8 bits all inputs of an output share a scale")
    scheme = Scheme(bits) if group is None else Scheme(bits, group)
    source = find(model)
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(str(scheme))
        save_quantised(
            source,
            out,
            scheme,
            overwrite=overwrite,
            on_tensor=lambda done, all: progress.update(task, completed=done, total=all),
        )
    size, before = (in_bytes(describe(name).weight_bytes) for name in (out, model))
    note(f"{scheme}: {size}, before {before}")
    write(printable(out) + "\n")
