"""The command `qwen2audio inspect`: how a question about a clip was answered, as a report."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2audio_core import install
from qwen2audio_core.errors import InputError
from qwen2audio_core.options import (
    Device,
    Dtype,
    Long,
    Model,
    NewTokens,
    NoPack,
    Seed,
    System,
    Temperature,
)
from qwen2audio_core.terminal import load, note, printable, quiet_libraries, write

if TYPE_CHECKING:
    from qwen2audio_core.inspection.collect import Inspection


def inspect(
    clip: Annotated[str, typer.Argument(metavar="CLIP", help="A file or URL.")],
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="None: the clip asks.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE.html", help="The report.")
    ] = "report.html",
    figures: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The pictures as PNG and SVG too; needs matplotlib."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE.npz", help="The numbers too, for NumPy.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the answer to look into, from its beginning.")
    ] = 24,
    model: Model = "tiny",
    system: System = None,
    temperature: Temperature = None,
    seed: Seed = None,
    max_new_tokens: NewTokens = 64,
    long: Long = "split",
    device: Device = None,
    dtype: Dtype = None,
    no_pack: NoPack = False,
) -> None:
    """Show how a question about a clip is answered: one HTML page that needs no network.

    In it: the sound and its log-mel, what the audio tower makes of them, the conversation as
    tokens, the answer with what else it might have said, where each token listened, attention by
    layer and head, the logit lens, time and memory. The answer is greedy unless a temperature is
    given.

    Example:

        qwen2audio inspect glass.mp3 "What is that sound?" -o report.html --figures figures
    """
    _check(output, figures, data)
    from qwen2audio_core.audio_files import check_local
    from qwen2audio_core.inspection.collect import inspect as look
    from qwen2audio_core.inspection.report import to_html

    check_local(clip)
    assistant = load(model, device, dtype, no_pack)
    with quiet_libraries(), _Progress() as progress:
        seen = look(
            assistant,
            clip,
            question,
            most_tokens=tokens,
            on_progress=progress.show,
            system=system,
            long=long,
            notice=note,
            temperature=temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        _save(Path(output), to_html(seen).encode())
        written = [output]
        if data is not None:
            _save_numbers(Path(data), seen)
            written.append(data)
        if figures is not None:
            from qwen2audio_core.inspection.figures import save

            written += [str(path) for path in save(seen, figures)]
    write(printable(seen.answer) + "\n")
    for name in written:
        note(f"wrote {name}")


def _check(output: str, figures: str | None, data: str | None) -> None:
    """What can be wrong with the places to write to, before anything is computed."""
    if not output.lower().endswith((".html", ".htm")):
        raise InputError(f"{output}: the report is a page, give it a name that ends in .html")
    if data is not None and not data.lower().endswith(".npz"):
        raise InputError(f"{data}: the numbers are an archive, give it a name that ends in .npz")
    if figures is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"--figures draws with matplotlib, which is not installed: {install.extra('plot')}"
            ) from error
    for name in (output, *([data] if data else [])):
        path = Path(name)
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise InputError(f"{name}: {what}, choose another name")


def _save(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _save_numbers(path: Path, seen: "Inspection") -> None:
    import numpy as np

    try:
        with path.open("wb") as file:
            np.savez_compressed(file, **seen.arrays())
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot write there ({error.strerror}), choose another place")


class _Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __enter__(self) -> "_Progress":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description:<18}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True, quiet=not sys.stderr.isatty()),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=1.0)
        return self

    def show(self, what: str, part: float) -> None:
        self._bar.update(self._task, description=what, completed=part)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
