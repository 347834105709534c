"""Every lesson: its skeleton fails with a hint, its solution passes, and mistakes are explained."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "lessons"
NAMES = sorted(path.stem for path in FOLDER.glob("0*.py"))

# One process for many lessons: most of a lesson's time is the import of torch.
RUN_EACH = """
import contextlib, io, json, runpy, sys, traceback
sys.path.insert(0, sys.argv[1])
found = []
for name, *words in json.loads(sys.argv[2]):
    sys.argv = [name, *words]
    code, said = 0, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(f"{sys.path[0]}/{name}.py", run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = "crashed"
    found.append((code, said.getvalue()))
print(json.dumps(found))
"""
Result = tuple[int, str]  # exit code, what was printed


def run_each(folder: Path, calls: list[list[str]]) -> list[Result]:
    command = [sys.executable, "-c", RUN_EACH, str(folder), json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results() -> dict[str, list[Result]]:
    calls = [[name, *words] for name in NAMES for words in ([], ["--solution"])]
    found = run_each(FOLDER, calls)
    return {name: found[2 * i : 2 * i + 2] for i, name in enumerate(NAMES)}


def test_there_are_eight() -> None:
    assert [name[:2] for name in NAMES] == [f"0{i}" for i in range(1, 9)]
    assert sorted(path.stem for path in (FOLDER / "solutions").glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_unfilled_lesson_says_what_to_do(name: str, results: dict[str, list[Result]]) -> None:
    code, said = results[name][0]
    assert code == 1, said
    assert "nothing has been computed yet" in said and "Traceback" not in said
    assert "Hint:    fill in the part marked YOUR TURN" in said
    line = int(said.split(f"{name}.py, line ")[1].split()[0])
    source = (FOLDER / f"{name}.py").read_text().splitlines()
    assert "--- YOUR TURN" in source[line - 1]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name: str, results: dict[str, list[Result]]) -> None:
    code, said = results[name][1]
    assert code == 0, said
    assert said.count("  ok  ") >= 3 and "\nPASS" in said
    following = [other for other in NAMES if other > name]
    assert (f"Next: python kernels/lessons/{following[0]}.py" if following else "last") in said


@pytest.mark.parametrize("name", NAMES)
def test_the_skeleton_is_the_solution_with_a_hole(name: str) -> None:
    """So that nobody has to change a line outside of the hole."""

    def code(path: Path) -> list[str]:
        return [
            line.split("  # ")[0].rstrip()
            for line in path.read_text().splitlines()
            if line.strip() and not line.strip().startswith(("#", '"""'))
        ]

    skeleton = code(FOLDER / f"{name}.py")
    dropped = {"pass", "y = tl.zeros((BLOCK,), tl.float32)", "y = tl.zeros((C,), tl.float32)"}
    dropped |= {"top = 0.0", "total = 0.0", "acc = tl.zeros((C,), tl.float32)"}
    solution = code(FOLDER / "solutions" / f"{name}.py")
    start, end = skeleton.index("@triton.jit"), skeleton.index(next_function(skeleton))
    kept = [line for line in skeleton[start:end] if line.strip() not in dropped]
    position = 0
    for line in kept:
        assert line in solution[position:], line
        position = solution.index(line, position) + 1
    assert len(solution) > len(kept)


def next_function(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("def ") and "_kernel" not in line)


def test_as_a_reader_runs_it(tmp_path: Path) -> None:
    """From another folder, with no PYTHONPATH and no setting of Triton's."""
    hidden = {"PYTHONPATH", "TRITON_INTERPRET"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    for words, code in (([], 1), (["--solution"], 0)):
        command = [sys.executable, str(FOLDER / "01_load_store.py"), *words]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert not done.stderr


# What readers get wrong: lesson, the solution's line, what they write, what they are told. How many
# places lie outside depends on what lies beside a tensor in memory.
MISTAKES = [
    ("01_load_store", ", mask=inside, other=0.0", "", "places that lie in no tensor"),
    (
        "01_load_store",
        "(x_ptr + offsets, mask=inside, other=0.0)",
        "(x_ptr + offsets)",
        "no tensor",
    ),
    ("01_load_store", "x + residual, mask=inside", "x + residual", "places that lie"),
    ("01_load_store", "tl.program_id(0) * BLOCK + ", "", "all programs do the same block"),
    ("01_load_store", "offsets < elements", "offsets < element", "NameError: name 'element'"),
    ("01_load_store", "    tl.store(", "    if inside:\n        tl.store(", "use tl.where"),
    ("01_load_store", "offsets < elements", "0 <= offsets < elements", "a < b < c take one"),
    ("02_rms_norm", "/ width", "/ BLOCK", "not by BLOCK"),
    ("02_rms_norm", "row * stride", "row * width", "the row starts at x_ptr + row * stride"),
    ("02_rms_norm", " + eps)", ") + eps", "tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)"),
    ("03_swiglu", "row * 2 * width + columns", "row * width + columns", "2 * width apart"),
    (
        "03_swiglu",
        "gate / (1.0 + tl.exp(-gate))",
        "gate * tl.exp(gate) / (1.0 + tl.exp(gate))",
        "i",
    ),
    ("04_rope", "t * stride_time", "t * heads * 2 * HALF", "use stride_time and stride_head"),
    ("05_matmul", "(rows < M)[:, None] & (inner", "(inner", "places that lie in no tensor"),
    (
        "05_matmul",
        "(rows < M)[:, None] & (inner < K)[None, :]",
        "(rows < M)[:, None]",
        "places that lie in no tensor",
    ),
    ("05_matmul", "(rows < M)[:, None] & (inner", "(rows < M)[:, None] and (inner", "use tl.where"),
    ("05_matmul", ", other=0.0", "", "in both tiles, other=0.0"),
    (
        "05_matmul",
        "tl.dot(x, tl.trans(w)",
        "tl.dot(x.to(tl.bfloat16), tl.trans(w).to(tl.bfloat16)",
        "of bfloat16",
    ),
    ("05_matmul", "acc = tl.dot(x", "y = tl.dot(x", "is every result assigned"),
    ("05_matmul", ', input_precision="ieee"', "", 'give it input_precision="ieee"'),
    ("06_online_softmax", "total * tl.exp(top - base)", "total", "relative to the old top"),
    ("06_online_softmax", "tl.maximum(top, tl.max(logits, axis=0))", "tl.max(logits)", "no less"),
    (
        "06_online_softmax",
        'tl.where(higher == -float("inf"), 0.0, higher)',
        "tl.maximum(higher, 0.0)",
        "exp(-1000) is zero",
    ),
    ("06_online_softmax", 'tl.where(higher == -float("inf"), 0.0, higher)', "higher", "is NaN"),
    ("06_online_softmax", "top = higher", "top = base", "top stays -inf"),
    ("07_flash_attention", "top = higher", "top = base", "base alone must be 0.0"),
    ("07_flash_attention", "acc * shrink[:, None]", "acc", "both shrunk"),
    ("07_flash_attention", 'tl.where(visible, s, -float("inf"))', "s", "before the maximum"),
    ("07_flash_attention", 'tl.where(higher == -float("inf"), 0.0, higher)', "higher", "must be 0"),
    (  # no maximum at all
        "07_flash_attention",
        "tl.maximum(top, tl.max(s, axis=1))",
        "tl.zeros((BLOCK_M,), tl.float32)",
        "exp(200) is infinite",
    ),
    ("07_flash_attention", "tl.maximum(top, tl.max(s, axis=1))", "tl.max(s, axis=1)", "no less"),
    (
        "07_flash_attention",
        'tl.where(higher == -float("inf"), 0.0, higher)',
        "tl.maximum(higher, 0.0)",
        "exp(-200) is zero",
    ),
    ("07_flash_attention", ', input_precision="ieee"', "", 'give it input_precision="ieee"'),
    ("08_split_kv_decode", "tl.exp(top - tl.max(top, axis=0))", "top * 0.0 + 1.0", "one weight"),
    ("08_split_kv_decode", 'tl.where(top == -float("inf"), 0.0, top)', "top", "0.0 where top is"),
    (  # no maximum at all
        "08_split_kv_decode",
        "top = tl.max(s, axis=0)",
        "top = tl.zeros((), tl.float32)",
        "exp(200) is infinite",
    ),
    ("08_split_kv_decode", "top - tl.max(top, axis=0)", "top", "exp(200) is infinite"),
    (
        "08_split_kv_decode",
        "p = tl.exp(s - base)",
        "p = tl.exp(s - base)\n    top = base",
        "must not be the highest",
    ),
]


def filled(name: str, right: str = "", wrong: str = "") -> str:
    """A lesson as a reader leaves it: the solution in the hole, with one mistake."""
    solution = (FOLDER / "solutions" / f"{name}.py").read_text()
    assert right in solution, (name, right)
    lesson = (FOLDER / f"{name}.py").read_text()
    body = lesson.index("\ndef ")
    while "_kernel(" in lesson[body:].split("\n")[1]:
        body = lesson.index("\ndef ", body + 1)
    kernels = solution[solution.index("@triton.jit") :]
    return lesson[: lesson.index("@triton.jit")] + kernels.replace(right, wrong) + lesson[body:]


def test_mistakes_are_explained(tmp_path: Path) -> None:
    calls = []
    for number, (name, right, wrong, _) in enumerate(MISTAKES):
        copy = tmp_path / f"{number:02}_{name}.py"
        copy.write_text(filled(name, right, wrong))
        calls.append([copy.stem])
    for name in ("lesson.py", "07_flash_attention.py"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    answers = run_each(tmp_path, calls)
    for (code, said), (name, right, wrong, told) in zip(answers, MISTAKES, strict=True):
        case = f"{name}: {right} -> {wrong}\n{said}"
        assert code == 1 and told in said and "Traceback" not in said, case


def test_an_error_names_the_readers_line(tmp_path: Path) -> None:
    shutil.copyfile(FOLDER / "lesson.py", tmp_path / "lesson.py")
    (tmp_path / "mine.py").write_text(filled("01_load_store", "offsets < elements", "offsets < n"))
    ((_, said),) = run_each(tmp_path, [["mine"]])
    lines = (tmp_path / "mine.py").read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "offsets < n" in text)
    assert f"Where:   line {line}: inside = offsets < n" in said


def test_a_reader_gets_to_the_end(tmp_path: Path) -> None:
    """Lesson 8 with the reader's own lesson 7, both filled in, and no solution in sight."""
    shutil.copyfile(FOLDER / "lesson.py", tmp_path / "lesson.py")
    for name in ("07_flash_attention", "08_split_kv_decode"):
        (tmp_path / f"{name}.py").write_text(filled(name))
    ((code, said),) = run_each(tmp_path, [["08_split_kv_decode"]])
    assert code == 0 and "attention: custom" in said, said

    text = (tmp_path / "08_split_kv_decode.py").read_text()
    block = textwrap.dedent(text[text.index("    import lesson") : text.index("Run it:")])
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "A bell is ringing.\n", done.stdout + done.stderr


def test_an_error_in_lesson_7_is_not_placed_in_lesson_8(tmp_path: Path) -> None:
    shutil.copyfile(FOLDER / "lesson.py", tmp_path / "lesson.py")
    seven = filled("07_flash_attention", "top = higher", "top = highest")
    (tmp_path / "07_flash_attention.py").write_text(seven)
    (tmp_path / "08_split_kv_decode.py").write_text(filled("08_split_kv_decode"))
    ((_, said),) = run_each(tmp_path, [["08_split_kv_decode"]])
    line = 1 + seven[: seven.index("top = highest")].count("\n")
    assert f"Where:   07_flash_attention.py, line {line}: top = highest" in said, said


def test_lesson_8_asks_for_lesson_7(tmp_path: Path) -> None:
    for name in ("lesson.py", "07_flash_attention.py"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    (tmp_path / "08_split_kv_decode.py").write_text(filled("08_split_kv_decode"))
    ((code, said),) = run_each(tmp_path, [["08_split_kv_decode"]])
    assert code == 1
    assert "finish it first: python kernels/lessons/07_flash_attention.py" in said
