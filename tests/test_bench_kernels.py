"""The kernels' benchmark: tests first, arms in turn, a table from files, nothing of a CPU kept."""

import csv
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import interpreter  # noqa: F401 - before the kernels are defined
import pytest
import torch

import qwen2audio_kernels as kernels
from qwen2audio_kernels import _launch

FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"
README = FOLDER.parent / "README.md"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("bench")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def shapes(bench: ModuleType) -> ModuleType:
    return importlib.import_module("shapes")


@pytest.fixture(scope="module")
def tune(bench: ModuleType) -> ModuleType:
    return importlib.import_module("tune")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("runs in Triton's interpreter, and here is a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_every_op_has_its_shapes(shapes: ModuleType) -> None:
    for quick in (True, False):
        assert {case.op for case in shapes.cases(quick)} == set(kernels.OPS)
    names = [(case.op, case.shape) for case in shapes.cases(False)]
    assert len(names) == len(set(names)), "two cases of one op share a name"


def test_the_work_of_known_shapes(shapes: ModuleType) -> None:
    work = {(case.op, case.shape): case.work for case in shapes.cases(False)}
    assert work["rms_norm", "800 x 4096"] == 2 * 800 * 4096 * 2
    encoder = work["attention", "encoder: 1 x 1500 queries, 1500 keys, 20 heads of 64"]
    assert encoder == 4 * 1500 * 1500 * 1280
    # A prefix: 64 queries see 801 to 864 keys.
    prefix = work["attention", "decoder: 1 x 64 queries, 864 keys, 32 heads of 128, causal"]
    assert prefix == 4 * 4096 * sum(range(801, 865))
    assert work["decode_attention", "1 x 1024 keys, 32 heads of 128"] * 32 == 536_870_912
    assert work["linear", "1 x 4096 to 156032, lm_head"] == 156032 * 4096 * 2


def test_every_case_goes_through(bench: ModuleType, shapes: ModuleType, on_cpu: None) -> None:
    for case in shapes.cases(True):
        bench.verify(case, "cpu", torch.bfloat16)
        for direction in ("forward", "both") if case.gradients else ("forward",):
            found = bench.race(case, direction, "cpu", torch.bfloat16, 2)
            assert found["times"].keys() == {"kernel", *case.peers}
            ceilings = {"read": 1.0, "copy": 1.0, "matmul": 1.0}
            row = bench.row_of(case, direction, found, {"gpu": "x"}, ceilings)
            assert row["dtype"] == ("float32" if case.op == "log_mel" else "bfloat16")
            assert tuple(row) == bench.COLUMNS and float(row["torch_x"]) > 0


def test_a_wrong_kernel_is_refused_at_its_shape(
    bench: ModuleType, shapes: ModuleType, on_cpu: None
) -> None:
    from dataclasses import replace

    right = next(case for case in shapes.cases(True) if case.op == "gelu")
    wrong = replace(right, kernel=lambda x: kernels.gelu(x) * 1.01)
    with pytest.raises(AssertionError, match="largest error"):
        bench.verify(wrong, "cpu", torch.float32)


def test_the_checks_of_their_own_reject_what_is_wrong(
    bench: ModuleType, shapes: ModuleType, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {op: getattr(kernels, op) for op in ("log_mel", "sample")}
    monkeypatch.setattr(kernels, "log_mel", lambda waveform: right["log_mel"](waveform) + 1e-4)
    monkeypatch.setattr(kernels, "sample", lambda **inputs: right["sample"](**inputs) ^ 1)
    own = [case for case in shapes.cases(True) if case.check is not None]
    assert {case.op for case in own} == set(right)
    for case in own:
        with pytest.raises(AssertionError, match=f"^{case.op}: "):
            bench.verify(case, "cpu", torch.bfloat16)


def test_sampling_races_against_ids_that_are_ready(
    shapes: ModuleType, monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    """The peer is timed on nothing but sampling.choose, and both penalise the same ids."""
    given, choose = [], shapes.sampling.choose
    monkeypatch.setattr(
        shapes.sampling, "choose", lambda *words: given.append(words) or choose(*words)
    )
    for case in shapes.cases(True):
        if case.op != "sample":
            continue
        inputs = case.inputs()
        theirs = case.peer_inputs(inputs)
        token = case.peers["torch"](**theirs)
        assert all(one is other for one, other in zip(given[-1], theirs.values(), strict=False))
        assert inputs["seen"].sum(1).tolist() == [theirs["history"].shape[1]] * len(token)
        assert inputs["seen"].gather(1, theirs["history"]).all()
        if "greedy" in case.shape:
            assert torch.equal(token, case.kernel(**inputs))
            assert torch.equal(token, case.plain(**inputs))


def test_the_command(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_cpu: None,
) -> None:
    """Tests, ceilings, two directions; and neither a CSV nor a table of what a CPU did."""
    before, tuned = README.read_bytes(), (FOLDER.parent / "qwen2audio_kernels" / "tuned.json")
    words = ["--device", "cpu", "--quick", "--ops", "gelu", "--results", str(tmp_path), "--tune"]
    table = tuned.read_bytes()
    assert bench.main(words) == 0
    said = capsys.readouterr().out
    order = ("testing gelu", "tuning gelu on", "gelu, 2 x 192, forward", "gelu, 2 x 192, both")
    assert [said.index(line) for line in order] == sorted(said.index(line) for line in order)
    assert "2 cases went through; no speed is kept" in said
    assert " ms " not in said and "GB/s" not in said
    assert not list(tmp_path.iterdir())
    assert README.read_bytes() == before and tuned.read_bytes() == table


def test_red_tests_mean_no_speed(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_cpu: None,
) -> None:
    broken = {"gelu": False, "swiglu": True}
    monkeypatch.setattr(bench, "tests_pass", lambda files, device, until: broken)
    assert bench.main(["--device", "cpu", "--quick", "--ops", "gelu,bias_gelu,swiglu"]) == 1
    said = capsys.readouterr().out
    assert "REFUSED gelu" in said and "REFUSED bias_gelu" in said
    assert "gelu, 2 x 192" not in said and "swiglu, 2 x 192, both" in said


def test_tests_pass_reads_the_exit_code(bench: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert bench.tests_pass({"there_is_none"}, "cpu") == {"there_is_none": False}


def test_tests_have_an_order_and_an_end(bench: ModuleType, monkeypatch, capsys) -> None:
    """Those of attention never end, and after them Ctrl-C is pressed."""
    began: list[str] = []
    killed: list[int] = []

    class Tests:
        pid, returncode = 123, 0

        def __init__(self, command: list[str], **options: object):
            self.file = command[-1].split("op_")[1]
            began.append(self.file)
            assert options["start_new_session"]

        def poll(self) -> int | None:
            return None if self.file == "attention.py" else 0

        def wait(self) -> None: ...

    monkeypatch.setattr(bench.subprocess, "Popen", Tests)
    monkeypatch.setattr(bench.os, "killpg", lambda group, signal: killed.append(group))
    files = {"gelu", "attention", "linear"}
    green = bench.tests_pass(files, "cpu", bench.time.perf_counter() + 0.5)
    assert began == ["linear.py", "attention.py"]
    assert green == {"linear": True} and killed == [123]
    assert "attention: not done in time" in capsys.readouterr().out
    assert bench.tests_pass(files, "cpu", 0.0) == {}

    def pressed(seconds: float) -> None:
        if began[-1] == "attention.py":
            raise KeyboardInterrupt

    began.clear()
    monkeypatch.setattr(bench.time, "sleep", pressed)
    with pytest.raises(KeyboardInterrupt):
        bench.tests_pass(files, "cpu")
    assert killed == [123, 123]


def test_the_cores_share_the_tests_on_a_gpu(bench: ModuleType, monkeypatch, capsys) -> None:
    """Of 16 cores each of four files has four, and the next begins when one ends."""
    began: list[list[str]] = []
    polls: dict[str, int] = {}

    class Tests:
        pid, returncode = 123, 1

        def __init__(self, command: list[str], **options: Any):
            began.append(command)
            self.file = command[-1]
            print("what they say", file=options["stdout"])

        def poll(self) -> int | None:
            polls[self.file] = polls.get(self.file, 0) + 1
            return None if polls[self.file] < 3 else 1

    monkeypatch.setattr(bench.subprocess, "Popen", Tests)
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 16)
    most: list[int] = []
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: most.append(len(began)))
    files = {"gelu", "attention", "linear", "rope", "swiglu", "sample"}
    assert bench.tests_pass(files, "cuda") == dict.fromkeys(files, False)
    assert most[:4] == [4, 4, 4, 6] and all(command[-3:-1] == ["-n", "4"] for command in began)
    assert capsys.readouterr().out.count("what they say") == 6


def test_arms_alternate(bench: ModuleType) -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, name: str):
            self.name = name

        def sample(self, device: str) -> float:
            order.append(self.name)
            return len(order)

    times = bench.alternate({name: Fake(name) for name in "abc"}, "cpu", 2)
    assert order == list("abccba") and times == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}


def test_results_and_table(bench: ModuleType, tmp_path: Path) -> None:
    def row(op: str, ms: str) -> dict[str, str]:
        given = {"gpu": "Some GPU", "op": op, "shape": "1 x 2", "ms": ms, "torch_x": "2.00"}
        return {name: given.get(name, "") for name in bench.COLUMNS}

    folder, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    assert "No GPU has measured" in bench.table(folder)
    bench.keep([row("rope", "1"), row("gelu", "2")], folder, {"rope", "gelu"})
    path = bench.keep([row("rope", "3")], folder, {"rope"})
    kept = {r["op"]: r["ms"] for r in csv.DictReader(path.open(newline=""))}
    assert path.name == "some_gpu.csv" and kept == {"rope": "3", "gelu": "2"}
    bench.write_table(readme, folder)
    text = readme.read_text()
    assert text.startswith(f"before\n{bench.BEGIN}\n") and text.endswith(f"{bench.END}\nafter\n")
    assert "old" not in text and "| rope | 1 x 2 |" in text and "**Some GPU**" in text
    bench.write_table(readme, folder)
    assert readme.read_text() == text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_the_readme_is_current(bench: ModuleType) -> None:
    text = README.read_text(encoding="utf-8")
    section = text.split(bench.BEGIN + "\n")[1].split(bench.END)[0]
    assert section == bench.table(bench.RESULTS)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (README.parent / target).exists(), target
    roofline = text.split("## What each op costs")[1].split("## Measured")[0]
    assert set(re.findall(r"`(\w+)`", roofline)) >= set(kernels.OPS)


def test_the_search_names_kernels_that_exist(tune: ModuleType, shapes: ModuleType) -> None:
    timed = {key for case in shapes.cases(False) for key, _ in case.tunes}
    assert (
        timed == set(tune.SEARCH) == {key for case in shapes.cases(True) for key, _ in case.tunes}
    )
    for key, search in tune.SEARCH.items():
        assert set(search) <= set(_launch.settings(key, "default")), key


def test_a_better_setting_is_found_and_a_wrong_one_rejected(
    tune: ModuleType, bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speed = {1024: 5.0, 2048: 3.0, 4096: 1.0}  # 4096 is the fastest, and wrong
    entry = _launch._table()["gelu"]
    before = json.dumps(_launch._table())

    def timed(key: str, arch: str, difference: dict, *rest: object) -> float:
        block = {**entry["default"], **difference}["BLOCK"]
        assert block != 4096, "wrong"
        return speed.get(block, 9.0)

    monkeypatch.setattr(tune, "timed", timed)
    case = type("Case", (), {"tunes": (("gelu", "forward"),), "shape": ""})
    monkeypatch.setattr(_launch, "arch", lambda device: "sm_90")
    monkeypatch.setattr(tune, "TABLE", tmp_path / "tuned.json")
    place = tune.place
    monkeypatch.setattr(tune, "candidates", lambda name, few: [{"BLOCK": b} for b in speed])
    try:
        assert tune.tune([case], "cpu", torch.bfloat16, 1, write=True) == {"gelu": {"BLOCK": 2048}}
        assert json.loads((tmp_path / "tuned.json").read_text())["gelu"]["sm_90"] == {"BLOCK": 2048}
        assert _launch.settings("gelu", "sm_90")["BLOCK"] == 2048
    finally:
        place("gelu", "sm_90", None)
    assert json.dumps(_launch._table()) == before


def test_the_table_is_saved_as_it_is_kept(tune: ModuleType, tmp_path: Path) -> None:
    tune.save(tmp_path / "tuned.json")
    assert (tmp_path / "tuned.json").read_bytes() == tune.TABLE.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ops", "softmax", "--device", "cpu", "--quick"], "no op 'softmax'"),
        (["--device", "cpu"], "--device cpu goes with --quick"),
    ],
)
def test_wrong_words(
    bench: ModuleType, words: list[str], message: str, capsys: pytest.CaptureFixture, on_cpu: None
) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    assert message in f"{end.value} {capsys.readouterr().err}"


@pytest.mark.gpu
def test_on_the_gpu(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{bench.BEGIN}\n{bench.END}\n")
    words = ["--ops", "gelu", "--samples", "2", "--results", str(tmp_path)]
    assert bench.main([*words, "--readme", str(tmp_path / "README.md")]) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.open(newline="")))
    timed = [row for row in rows if not row["op"].startswith("ceiling")]
    assert {row["timed"] for row in timed} == {"graph"}
    assert all(float(row["ms"]) > 0 for row in timed)
