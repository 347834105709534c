"""The grid of arms: what it shares, counts, refuses and writes, at small shapes on the CPU."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qwen2audio_core import tiny
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.packing import Projection, groups, projection

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("bench_grid", ROOT / "scripts" / "bench_grid.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["bench_grid"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan_of(grid: ModuleType, **changes) -> object:
    plan = grid.Plan(
        tiny.TINY, CPU, torch.float32, ((1, 1), (1, 3)), grid.ARMS, 3,
        rounds=1, budget=1e9, quick=True,
    )  # fmt: skip
    return replace(plan, **changes)


@pytest.fixture(scope="module")
def small(grid: ModuleType):
    with torch.inference_mode():
        made = grid.Grid(plan_of(grid))
    made.ceilings = {"read": 10.0, "copy": 10.0, "matmul": 0.1}
    return made


def arms_of(small, batch: int) -> dict:
    """Every arm's first turn at one second and that batch."""
    small.cells.clear()
    small.runs.clear()
    with torch.inference_mode():
        for arm in small.plan.arms:
            small.turn((1, batch), arm)
    return small.cells[1, batch]["arms"]


def test_every_arm_has_the_same_weights(grid: ModuleType, small) -> None:
    """transformers' too: the very same memory, and logits that agree to rounding."""
    ours = {tensor.data_ptr() for tensor in small.model.state_dict().values()}
    with torch.inference_mode():
        theirs = grid.transformers_model(small.model, "sdpa").state_dict().values()
    assert {tensor.data_ptr() for tensor in theirs} == ours
    assert all(type(projection(*(one for _, one in g))) is Projection for g in groups(small.model))
    twin = small.twins["int4"].state_dict()
    shared = [name for name in twin if name in small.model.state_dict()]
    assert len(shared) > 50
    assert all(twin[name].data_ptr() in ours for name in shared)
    for batch in (1, 3):
        prompts = grid.prompts_of(tiny.TINY, 1, batch)
        with torch.inference_mode():
            errors = {name: small.error(name, small.arm(name, prompts), 1) for name in grid.ARMS}
        for name in ("eager", "sdpa", "compiled", "plain", "engine"):
            assert errors[name]["rms"] < 1e-5 and errors[name]["agreement"] == 1
        assert 1e-5 < errors["int8_cache"]["rms"] < errors["int4"]["rms"] < 0.3
        assert 1e-3 < errors["int8"]["rms"] < 0.05


def test_a_wrong_arm_gets_no_speed(grid: ModuleType, small, monkeypatch) -> None:
    logits = grid.Fast.logits
    monkeypatch.setattr(small, "errors", {})
    monkeypatch.setattr(grid.Fast, "logits", lambda arm, forced: logits(arm, forced).roll(1, -1))
    monkeypatch.setattr(small.plan, "arms", ("plain", "engine", "int4"))
    arms = arms_of(small, 1)
    assert "tpot" in arms["plain"]
    for name in ("engine", "int4"):
        assert "logits are off by" in arms[name]["refused"] and "tpot" not in arms[name]


@pytest.mark.parametrize("row", [0, 2])
def test_an_arm_that_is_wrong_in_a_batch_alone_gets_no_speed_there(
    grid: ModuleType, small, row: int, monkeypatch
) -> None:
    """One row of a full batch is wrong: in the engine's last product, and in generate.py's."""
    made, head = grid.Engine, small.model.language_model.lm_head

    def spoil(logits: torch.Tensor) -> torch.Tensor:
        if len(logits) == 3:
            logits[row] = logits[row].roll(1, -1)
        return logits

    def engine(*args, **options):
        found = made(*args, **options)
        right = found.slots.head
        found.slots.head = lambda x: spoil(right(x))
        return found

    monkeypatch.setattr(small, "errors", {})
    monkeypatch.setattr(grid, "Engine", engine)
    monkeypatch.setattr(small.plan, "arms", ("plain", "engine"))
    hook = head.register_forward_hook(lambda _, words, logits: spoil(logits))
    try:
        alone, three = arms_of(small, 1), arms_of(small, 3)
    finally:
        hook.remove()
    for name in ("plain", "engine"):
        assert "tpot" in alone[name]
        assert "logits are off by" in three[name]["refused"] and "tpot" not in three[name]


def test_an_arm_that_cannot_run_costs_no_other(grid: ModuleType, small, monkeypatch) -> None:
    def broken(*words) -> None:
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setattr(grid.Plain, "warm", broken)
    monkeypatch.setattr(small.plan, "arms", ("plain", "engine"))
    arms = arms_of(small, 3)
    assert arms["plain"]["refused"] == "RuntimeError: out of memory"
    assert arms["engine"]["tokens_per_s"] > 0


def test_floors_of_the_published_shape(grid: ModuleType) -> None:
    """The figures of the counted floors that the targets come from, at 4.3 TB/s and 790 TFLOP/s."""
    plan = plan_of(grid, config=Qwen2AudioConfig(), dtype=torch.bfloat16, new_tokens=0)
    made = grid.Grid.__new__(grid.Grid)
    made.plan = plan
    made.model = grid.weights.without_storage(plan.config)
    made.twins = {}
    for name, scheme in grid.SCHEMES.items():
        twin = made.twins[name] = grid.weights.without_storage(plan.config)
        grid.quantize.lay_out(twin, grid.quantize.linear_paths(twin), scheme)
    made.ceilings = {"read": 4300.0, "copy": 4300.0, "matmul": 790.0}
    alone = made.floors(30, 1)
    assert alone["engine"]["encoder"] == pytest.approx(2.88e-3, rel=0.02)
    # 13.4 ms for all positions of all layers, less what the last one need not do for 799 of them.
    assert alone["engine"]["prefill"] == pytest.approx(13.05e-3, rel=0.01)
    assert made.floors(3, 1)["engine"]["encoder"] == pytest.approx(0.30e-3, rel=0.03)
    for name, milliseconds in (("engine", 3.31), ("int8", 1.655), ("int4", 0.88)):
        held = 800 * 524_288 / 4.3e12
        assert alone[name]["tpot"] - held == pytest.approx(milliseconds * 1e-3, rel=0.01)
    many = made.floors(30, 32)
    held = {name: many[name]["tpot"] - 14.23e9 / 4.3e12 for name in ("engine", "int8_cache")}
    assert held["engine"] / held["int8_cache"] == pytest.approx(256 / 132, rel=0.01)


def test_a_budget_leaves_turns_out(grid: ModuleType, small, monkeypatch) -> None:
    """What takes as long as before would end too late; others have their turn."""
    monkeypatch.setattr(small.plan, "arms", ("plain", "engine", "sdpa"))
    monkeypatch.setattr(small.plan, "cells", ((3, 1), (1, 2)))
    monkeypatch.setattr(small.plan, "rounds", 2)
    clock = [0.0]
    monkeypatch.setattr(type(small.plan), "left", property(lambda plan: plan.budget - clock[0]))
    monkeypatch.setattr(grid.time, "perf_counter", lambda: clock[0])
    turns: list[tuple[tuple[int, int], str]] = []

    def turn(cell: tuple[int, int], arm: str) -> bool:
        turns.append((cell, arm))
        small.cells[cell] = {"arms": {}}
        clock[0] += {"plain": 1.0, "engine": 2.0, "sdpa": 10.0}[arm]
        return arm != "engine"

    monkeypatch.setattr(small, "turn", turn)
    monkeypatch.setattr(small, "cells", {})
    monkeypatch.setattr(small.plan, "budget", 17.5)
    assert small.run(small.ceilings, lambda cells: None) == [
        {"seconds": 1, "batch": 2, "arm": "sdpa"}
    ]
    first = [((3, 1), "engine"), ((3, 1), "plain"), ((3, 1), "sdpa"), ((1, 2), "plain")]
    # The engine was wrong in both, and has no second turn.
    assert turns == [*first, ((1, 2), "engine"), ((1, 2), "plain")]
    monkeypatch.setattr(small.plan, "budget", 0.0)
    turns.clear()
    assert len(small.run(small.ceilings, lambda cells: None)) == 6 and not turns


def test_what_the_targets_ask_for_comes_first(grid: ModuleType) -> None:
    made = grid.Grid.__new__(grid.Grid)
    made.plan = plan_of(grid, cells=grid.CELLS, rounds=2)
    turns = list(made.turns())
    first, second = turns[: len(turns) // 2 + 1], turns[len(turns) // 2 + 1 :]
    cells = {((seconds, batch), arm) for _, seconds, batch, arm, *_ in grid.TARGETS}
    assert {turn[1:] for turn in first[: len(cells)]} == cells
    assert first[len(cells)] == (0, (3, 1), "compiled")
    once = {turn[1:] for turn in second}
    assert len(first) == len(set(first)) == len(grid.CELLS) * (len(grid.ARMS) - 1) + 1
    assert [turn[1:] for turn in second] == [t[1:] for t in first[::-1] if t[2] != "compiled"]
    assert {turn[1:] for turn in first} - once == {((3, 1), "compiled")}


def test_targets(grid: ModuleType) -> None:
    arms = {
        "engine": {"tokens_per_s": 260.0, "tpot": 1 / 260, "of_floor": {"tpot": 0.8}},
        "compiled": {"tpot": 1 / 150},
        "int8": {"refused": "x"},
    }
    found = grid.reached([{"seconds": 3, "batch": 1, "arms": arms}])
    by = {(one["figure"], one["arm"], one["seconds"]): one for one in found}
    assert by["tokens_per_s", "engine", 3]["reached"] is True
    assert by["of_floor.tpot", "engine", 3]["reached"] is False
    assert by["tokens_per_s", "int8", 3]["found"] is None
    assert "reached" not in by["encoder", "engine", 30]
    assert by["engine's speed over compiled", "engine", 3]["reached"] is True


def test_a_run_from_the_command(
    grid: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    words = ["--device", "cpu", "--shapes", "tiny", "--quick", "--cells", "1x2", "--rounds", "2"]
    arms = ("sdpa", "compiled", "engine", "int4")
    words += ["--arms", ",".join(arms), "--new-tokens", "3"]
    assert grid.main([*words, "--json", str(out), "--plot", str(picture)]) == 0
    result = json.loads(out.read_text())
    (cell,) = result["cells"]
    assert (cell["seconds"], cell["batch"], tuple(cell["arms"])) == (1, 2, arms)
    for name, arm in cell["arms"].items():
        assert len(arm["tpot_runs"]) == (1 if name == "compiled" else 2)
        assert arm["peak_bytes"] is None
        for stage in ("mel", "encoder", "prefill", "ttft", "tpot"):
            assert arm[stage] > 0 and arm["of_floor"][stage] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "its speeds stand for nothing" in shown and "GB/s" in shown
    for wrong, message in (("5x0", "is no cell"), ("31x1", "is no cell"), ("x", "is no cell")):
        assert grid.main([*words, "--cells", wrong]) == 2
        assert message in capsys.readouterr().err


def test_bench_model_hands_a_gpu_to_the_grid(grid: ModuleType, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location(
        "bench_model", ROOT / "scripts" / "bench_model.py"
    )
    assert spec is not None and spec.loader is not None
    bench_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_model)
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(bench_model.bench_grid, "grid", lambda args: asked.append(args) or 0)
    assert bench_model.main(["--device", "cuda"]) == 0
    assert bench_model.main(["--grid", "--shapes", "tiny", "--quick"]) == 0
    assert [args.shapes for args in asked] == ["official", "tiny"]
    assert asked[0].budget > 600 and asked[1].quick


def report(
    python: Path | str, *words: Path | str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_report.sh"), *map(str, words)],
        env=os.environ | {"PYTHON": str(python)} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_whole_report(tmp_path: Path) -> None:
    done = report(sys.executable, tmp_path / "out")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.returncode == 0, summary + done.stdout[-2000:]
    assert summary.count(": done in ") == 3
    if not torch.cuda.is_available():
        assert "these speeds stand for nothing" in summary
    assert json.loads((tmp_path / "out" / "model.json").read_text())["cells"]
    assert (tmp_path / "out" / "model.png").exists()


def test_a_report_on_a_gpu_runs_these_commands(tmp_path: Path) -> None:
    """A stand-in for a Python that sees a GPU, which says what it is asked."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *is_available*) exit;; *device_name*) echo Some GPU; exit;; esac\n'
        f'printf "%s\\n" "$*" >> "{tmp_path}/asked"\n'
    )
    fake.chmod(0o755)
    done = report(fake, tmp_path / "the out")
    assert done.returncode == 0, done.stdout + done.stderr
    asked = [line for line in (tmp_path / "asked").read_text().splitlines() if "xdist" not in line]
    tests, kernels, model, table = asked
    named = {word for word in tests.split() if word.startswith("tests/")}
    marked = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(r"pytest\.mark\.gpu\b", path.read_text())
    }
    assert named == marked | {"tests/test_model_on_triton.py"} and len(marked) > 4
    assert kernels.split()[0] == "kernels/benchmarks/bench.py" and "--budget" in kernels
    assert model.split()[:2] == ["scripts/bench_model.py", "--grid"] and "cuda" in model
    assert table.endswith("--table")
    summary = (tmp_path / "the out" / "summary.txt").read_text().splitlines()
    assert summary[0] == "GPU: Some GPU" and len(summary) == 4

    def budget(line: str) -> int:
        return int(line.split("--budget ")[1].split()[0])

    assert (budget(kernels), budget(model)) == (162, 243)
    assert "-n 6" in tests
    assert report(fake, tmp_path / "more", MINUTES="25").returncode == 0
    assert report(fake, tmp_path / "alone", "model").returncode == 0
    asked = (tmp_path / "asked").read_text().splitlines()[len(asked) + 1 :]
    assert [budget(line) for line in asked if "--budget" in line] == [405, 607, 513]
    for wrong in ("0", "00", "08", "ten", "1.5", "100", "-3"):
        done = report(fake, tmp_path / "wrong", MINUTES=wrong)
        assert done.returncode == 2 and "MINUTES is " in done.stderr
    assert not (tmp_path / "wrong").exists()


def test_a_report_names_the_part_that_fails(tmp_path: Path) -> None:
    """A stand-in for Python: the tests fail, the kernels end well, the model takes too long."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *is_available*) exit 1;; *-m?pytest*) exit 3;;'
        " *bench_model*) exit 124;; esac\n"
    )
    fake.chmod(0o755)
    done = report(fake, tmp_path / "out")
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert done.returncode == 1
    assert lines[0].startswith("no GPU") and lines[1].startswith("tests: FAILED with exit code 3")
    assert lines[2].startswith("kernels: done") and lines[3].startswith("model: OUT OF TIME")
    alone = report(fake, tmp_path / "out", "kernels")
    after = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert alone.returncode == 0
    # The part's line of before has made way for a new one.
    assert [line.split(":")[0] for line in after] == [
        "no GPU", "tests", "model", "no GPU", "kernels"
    ]  # fmt: skip
    for words in ([], ["out", "speed"], ["out", "tests", "model"]):
        usage = report(fake, *words)
        assert usage.returncode == 2 and "usage: " in usage.stderr
