"""Run the code of docs/tour.md and draw its pictures.

    python scripts/make_tour.py                 writes docs/tour/*.png
    python scripts/make_tour.py --out DIR       writes into DIR
    python scripts/make_tour.py --model FOLDER  with another checkpoint in the place of "tiny"

The python blocks share one namespace and run in order. The figure that a block leaves open is saved
under the name of the picture that follows it in the text. Needs matplotlib (the extra `plot`). The
block marked `py` needs transformers too, draws nothing and is left to tests/test_tour.py.
"""

import argparse
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "docs" / "tour.md"
PICTURES = ROOT / "docs" / "tour"
LARGEST = 60_000  # bytes of a picture
_PART = re.compile(
    r"^```python\n(.*?)^```$|^!\[[^\]]*\]\(tour/([\w.]+)\)$", re.DOTALL | re.MULTILINE
)
# Okabe and Ito's colours, told apart by everybody; cividis is made for the same.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")


def parts(text: str) -> Iterator[tuple[str, str, int]]:
    """(code, "", its first line) of each block, and ("", file name, line) of each picture."""
    for found in _PART.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield (found[1] or "", found[2] or "", line + 1 if found[1] else line)


def run(text: str, out: Path, model: str | None = None) -> list[Path]:
    """Run all blocks and write all pictures into `out`; returns their paths."""
    try:
        import matplotlib
    except ImportError as error:
        from qwen2audio_core import install

        raise SystemExit(f"error: pictures need matplotlib: {install.extra('plot')}") from error
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "figure.figsize": (7.5, 2.8),
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "image.cmap": "cividis",
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    names: dict[str, object] = {"__name__": "tour"}
    # The blocks switch gradients off and interactive pictures on for good, and seed the random
    # numbers; leaving these contexts puts back what was.
    with (
        matplotlib.rc_context(style),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        chdir(ROOT),
        warnings.catch_warnings(),
        ExitStack() as stack,
    ):
        stack.callback(pyplot.close, "all")
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # what the pictures' times are of
        warnings.simplefilter("ignore", DeprecationWarning)  # of matplotlib, drawing tensors
        for code, picture, line in parts(text):
            if code:
                if model is not None:
                    code = code.replace('load("tiny"', f"load({model!r}")
                # Line ends in front let an error name the line of the text.
                exec(compile("\n" * (line - 1) + code, str(TEXT), "exec"), names)
                continue
            if not pyplot.get_fignums():
                raise ValueError(f"{TEXT.name}:{line}: no figure was drawn for {picture}")
            written.append(_save(pyplot.gcf(), out / picture))
            pyplot.close("all")
    return written


def _save(figure: object, path: Path) -> Path:
    """A PNG of few colours: as many as fit into LARGEST bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")  # type: ignore[attr-defined]
    with Image.open(buffer) as image:
        drawn = image.convert("RGB")
    for colours in (40, 24, 16, 8):
        drawn.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= LARGEST:
            break
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURES)
    parser.add_argument("--model", help='checkpoint in the place of "tiny"')
    args = parser.parse_args(argv)
    model = args.model and os.path.abspath(args.model)
    for path in run(TEXT.read_text(encoding="utf-8"), args.out.resolve(), model):
        print(f"{path.name}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
