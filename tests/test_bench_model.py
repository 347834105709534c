"""The benchmark refuses to time what differs, alternates the arms, and writes what it promises."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qwen2audio_core import frontend

pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_model.py"
RATIOS = {"ratio", "low", "high", "ours_s", "peer_s"}


@pytest.fixture(scope="module")
def bench_model() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script that is run
    spec = importlib.util.spec_from_file_location("bench_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_alternate(bench_model: ModuleType) -> None:
    order: list[str] = []

    def arm(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    race = bench_model.Race(lambda: arm("ours", 1.0), lambda: arm("peer", 3.0), 0.0, 0.0)
    assert bench_model.alternate(race, 3) == [(1.0, 3.0)] * 3
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_spread(bench_model: ModuleType) -> None:
    assert bench_model.spread([(1.0, 3.0)] * 5) == {
        **dict.fromkeys(("ratio", "low", "high"), 3.0),
        **{"ours_s": 1.0, "peer_s": 3.0},
    }
    noisy = bench_model.spread([(1.0, 2.0), (1.1, 2.0), (1.0, 2.2), (0.9, 2.0), (5.0, 2.1)])
    assert noisy["ratio"] == 2.0 and noisy["low"] < 2.0 < noisy["high"]


def test_every_stage_of_the_issue_is_there(bench_model: ModuleType) -> None:
    assert set(bench_model.STAGES) == {
        *("log_mel_3s", "log_mel_30s", "encoder_3s", "encoder_10s", "encoder_30s"),
        *("ttft_3s", "decode_b1", "decode_b8", "load", "import"),
        *("decode_b1_engine", "decode_b1_int8", "decode_b1_int4"),
    }


def run(bench_model: ModuleType, tmp_path: Path, stages: str, code: int = 0) -> dict:
    out = tmp_path / "result.json"
    words = ["--shapes", "tiny", "--dtype", "float32", "--repeats", "1", "--stages", stages]
    threads = torch.get_num_threads()
    try:
        assert bench_model.main([*words, "--threads", "1", "--json", str(out)]) == code
    finally:
        torch.set_num_threads(threads)
    return json.loads(out.read_text())


def check(one: dict) -> None:
    assert one.keys() >= RATIOS and 0 < one["low"] <= one["ratio"] <= one["high"]
    assert one["ours_s"] > 0 and one["error"] <= 1e-4


def test_a_run(bench_model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "log_mel_3s,encoder_3s,ttft_3s,decode_b8,decode_b1_engine"
    results = run(bench_model, tmp_path, stages)
    assert list(results) == ["machine", *stages.split(",")]
    for stage in stages.split(","):
        check(results[stage])
    assert results["machine"]["dtype"] == "float32" and results["machine"]["threads"] == 1
    assert results["decode_b8"]["peer_cache"] in ("dynamic", "static")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[2:]] == stages.split(",")


def test_a_wrong_result_is_never_timed(
    bench_model: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    window, halves = frontend.constants(128, torch.device("cpu"), torch.float32)
    wrong = [(heard, bands * 1.01) for heard, bands in halves]
    monkeypatch.setattr(frontend, "constants", lambda *_: (window, wrong))
    results = run(bench_model, tmp_path, "log_mel_3s", code=1)
    assert results["log_mel_3s"].keys() == {"refused"}
    assert "REFUSED" in capsys.readouterr().out and "differ" in results["log_mel_3s"]["refused"]


def test_quantised_arms_show_their_accuracy(bench_model: ModuleType, tmp_path: Path) -> None:
    results = run(bench_model, tmp_path, "decode_b1_int8,decode_b1_int4")
    int8, int4 = (results[f"decode_b1_{name}"] for name in ("int8", "int4"))
    for one in (int8, int4):
        assert one.keys() >= RATIOS and one["accuracy"]["tokens"] == 128
    assert 0 < int8["accuracy"]["relative_rms"] < int4["accuracy"]["relative_rms"] < 0.3
    assert int8["accuracy"]["agreement"] > int4["accuracy"]["agreement"] > 0.3
    assert 0 < int8["error"] < int4["error"]


def test_a_broken_quantised_arm_is_never_timed(
    bench_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine must agree with generate.py on the same codes, and not merely be close."""
    forced = bench_model.forced_logits
    monkeypatch.setattr(bench_model, "forced_logits", lambda *words: forced(*words) * 1.01)
    results = run(bench_model, tmp_path, "decode_b1_int8", code=1)
    assert results["decode_b1_int8"].keys() == {"refused"}


@pytest.mark.slow
def test_ours_against_ours(bench_model: ModuleType, tmp_path: Path) -> None:
    results = run(bench_model, tmp_path, ",".join(bench_model.OWN_STAGES))
    for stage in bench_model.OWN_STAGES:
        assert results[stage].keys() >= RATIOS, results[stage]
    assert 0 < results["int8_cache_b8"]["relative_rms"] < 0.02


@pytest.mark.slow
def test_load(bench_model: ModuleType, tmp_path: Path) -> None:
    one = run(bench_model, tmp_path, "load")["load"]
    check(one)
    assert one["ours_untouched_s"] <= one["ours_s"]
    for arm in ("ours", "peer"):  # every page was touched, and no page of another process counts
        assert 0.5 < one[f"{arm}_peak_bytes"] / one["bytes"] < 8
        assert one[f"{arm}_process_peak_bytes"] > one[f"{arm}_peak_bytes"]


@pytest.mark.slow
def test_import(bench_model: ModuleType, tmp_path: Path) -> None:
    one = run(bench_model, tmp_path, "import")["import"]
    assert one.keys() >= RATIOS | {"help_s", "package_s", "torch_s"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "decode_b9"], "no stage 'decode_b9'"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--shapes", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_words(
    bench_model: ModuleType, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_model.main(words) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
