"""What runs a lesson. Nothing to learn here: open 01_load_store.py.

A lesson imports this file first, calls `compare` in its `check`, and ends with `main(globals())`.
The kernels run on the CPU, in Triton's interpreter: one program after the other, every block a
NumPy array. It is slow and exact, and it can be watched: a read or write outside every tensor,
which on a GPU would be silent damage, is an error here.
"""

import argparse
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# Both are read as the libraries are imported. NumPy's threads fight torch's over tiny tiles.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

FOLDER = Path(__file__).resolve().parent
HOLE = "YOUR TURN"


def stop(message: str) -> NoReturn:
    """End the lesson unfinished: exit code 1, no traceback."""
    print(f"\n{message}")
    sys.exit(1)


try:
    import numpy as np
    import torch
    from torch import Tensor
    from triton.runtime import interpreter
except ImportError as error:
    stop(
        f"{error}. The lessons need torch, numpy and triton (Linux; on Windows use WSL, on a Mac"
        " a Linux container):  pip install torch numpy triton"
    )

# The model and the finished kernels, for a checkout that is not installed.
sys.path += [str(FOLDER.parents[1]), str(FOLDER.parent)]
torch.manual_seed(0)


passed: list[str] = []  # cases of the lesson that runs


class NotYet(Exception):
    """A check that failed, with a hint."""

    def __init__(self, problem: str, hint: str):
        super().__init__(problem)
        self.hint = hint


def compare(case: str, got: Tensor, want: Tensor, hint: str, limit: float = 1e-5) -> None:
    """Print ok where `got` is `want` up to `limit` of its largest value, else raise NotYet."""
    if got.shape != want.shape:
        raise NotYet(f"{case}: shape {tuple(got.shape)}, expected {tuple(want.shape)}", hint)
    if not passed and not got.nan_to_num().any():
        raise NotYet(
            f"{case}: nothing has been computed yet, every value is 0 or NaN",
            f"fill in the part marked {HOLE}, step by step; if you have: is every result assigned"
            " and stored, and is what was prepared in its place gone?",
        )
    error = (got.double() - want.double()).abs().nan_to_num(float("inf"))
    if error.max() > limit * want.double().abs().max():
        place = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
        wrong = int((error > limit * want.double().abs().max()).sum())
        value = got[place].item()
        shown = "NaN, computed so or never written," if value != value else f"{value:.6g}"
        raise NotYet(
            f"{case}: {wrong} of {got.numel()} values are wrong; the worst, at {list(place)}, is"
            f" {shown} where {want[place].item():.6g} is expected",
            hint,
        )
    passed.append(case)
    print(f"  ok    {case}")


def empty(*shape: int) -> Tensor:
    """A float32 tensor that is not initialised: NaN, so that a place never written shows."""
    return torch.full(shape, float("nan"))


def load(name: str) -> ModuleType:
    """The file kernels/lessons/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(names: dict[str, Any], name: str) -> None:
    """Put a lesson's solution in the place of the reader's functions."""
    solution = load(f"solutions/{name}")
    names.update({k: v for k, v in vars(solution).items() if k in names and k.endswith("_kernel")})


def main(names: dict[str, Any]) -> None:
    """Run a lesson: names["check"]() on the reader's kernels, or with --solution on ours."""
    file = Path(names["__file__"])
    parser = argparse.ArgumentParser(description=names["__doc__"].splitlines()[0])
    parser.add_argument("--solution", action="store_true", help="check the solution instead")
    arguments = parser.parse_args()
    if arguments.solution:
        fill(names, file.stem)
    print(names["__doc__"].splitlines()[0])
    passed.clear()
    lines = file.read_text(encoding="utf-8").splitlines()
    holes = [str(number) for number, line in enumerate(lines, start=1) if HOLE in line]
    where = file.name + (f", line {' and '.join(holes)}" if holes else "")
    try:
        names["check"](arguments.solution)
    except NotYet as problem:
        stop(f"NOT YET  {problem}\nHint:    {problem.hint}\nWhere:   {where}")
    except Exception as error:
        # Triton wraps what happened in a kernel; the reader's own line is the one that helps.
        cause = error.__cause__ or error
        frames = [
            frame
            for frame in traceback.extract_tb(cause.__traceback__)
            if Path(frame.filename).parent == file.parent and frame.filename != __file__
        ]
        at = where
        if frames:
            last = frames[-1]
            other = "" if last.filename == str(file) else f"{Path(last.filename).name}, "
            at = f"{other}line {last.lineno}: {last.line}"
        hint = getattr(cause, "hint", "read that line again; solutions/ has the finished kernel")
        kind = "" if isinstance(cause, NotYet) else f"{type(cause).__name__}: "
        stop(f"NOT YET  {kind}{cause}\nHint:    {hint}\nWhere:   {at}")
    later = sorted(path.name for path in FOLDER.glob("0*.py") if path.name > file.name)
    following = f"Next: python kernels/lessons/{later[0]}" if later else "That was the last lesson."
    print(f"\nPASS  {following}")


def watch() -> None:
    """Make the interpreter refuse what a GPU would do wrong in silence, and work with NumPy 2.4."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    read, write, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    dot, patch_tensor = builder.create_dot, interpreter._patch_lang_tensor
    triton_itself = str(Path(interpreter.__file__).parents[1])
    memory: list[tuple[int, int]] = []

    def guard(pointers: Any, mask: Any, verb: str) -> None:
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        lost = np.ones(places.shape, dtype=bool)
        for first, last in memory:
            lost &= (places < first) | (places >= last)
        if lost.any():
            raise NotYet(
                f"the kernel {verb} {int(lost.sum())} places that lie in no tensor",
                "a mask is missing or wrong there, or a pointer is",
            )

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        guard(pointers, mask, "reads")
        element = pointers.get_element_ty()
        if other is None and element.is_floating():  # a GPU may leave anything there
            other = interpreter.TensorHandle(
                np.full(pointers.data.shape, np.nan, interpreter._get_np_dtype(element)), element
            )
        return read(self, pointers, mask, other, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard(pointers, mask, "writes")
        return write(self, pointers, value, mask, *rest)

    def exact_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, *rest: Any) -> Any:
        if "bf16" in (str(a.dtype), str(b.dtype)):
            raise NotYet(
                "this tl.dot is of bfloat16, which the interpreter takes for integers",
                "stay in float32 here; on a GPU it is right",
            )
        if a.data.dtype == np.float32 and precision.name != "IEEE":
            raise NotYet(
                "this tl.dot does not multiply all bits of a float32 on a GPU, though it does here",
                'give it input_precision="ieee"',
            )
        return dot(self, a, b, acc, precision, *rest)

    def watched_call(self: Any, *arguments: Any, **options: Any) -> None:
        given = (*arguments, *options.values())
        storages = [x.untyped_storage() for x in given if isinstance(x, Tensor)]
        memory[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        with np.errstate(all="ignore"):  # exp(1000) is inf on a GPU too, without a warning
            call(self, *arguments, **options)

    def truth(self: Any) -> bool:
        if self.handle.data.size == 1:
            return bool(self.handle.data.item())
        if sys._getframe(1).f_code.co_filename.startswith(triton_itself):  # asks "is there one?"
            return True
        raise NotYet(
            "if, and, or, not and a < b < c take one value here, and this is a block of them",
            "use tl.where for a choice, and & | ~ with brackets around each comparison",
        )

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__bool__ = truth
        # range(0, n) asks a one-element array for an integer, which NumPy 2.4 no longer gives.
        tensor.__index__ = lambda self: self.handle.data.item()

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_dot, executor.__call__ = exact_dot, watched_call
    interpreter._patch_lang_tensor = patch_lang_tensor


watch()
