"""Two processes that share the weights (FSDP2 over gloo) take the steps that one process takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_rows import SHAPE, checkpoint, official_rows, settings, write_lines

from qwen2audio_core.training import loop, parallel, report
from qwen2audio_core.training.lora import Settings as Adapter

COMMON = {"steps": 4, "save_every": 2, "batch_seconds": 1.2, "lr": 1e-3, "ctc_weight": 0.5}
RANK_TWO = Adapter(rank=2, alpha=4.0)
PAIRS = {"stage": "dpo", "ctc_weight": 0.0, "batch_tokens": 1}  # a row is a batch
KINDS = {
    "whole": {},
    "lora": {"adapter": RANK_TWO},
    "listening": {"listen_steps": 4},
    "dpo": PAIRS,
    "dpo-lora": PAIRS | {"adapter": RANK_TWO},
}
SCRIPT = """
import sys
from test_training_parallel import COMMON, KINDS, file_of
from training_rows import settings
from qwen2audio_core.training import loop, report
report.EVERY = 0.0
base, data, out = sys.argv[1:]
for kind, more in KINDS.items():
    loop.train(settings(base, [file_of(data, kind)], f"{out}/{kind}", **COMMON | more))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Rows with and without sound, which lie in batches of their own; and pairs, of which some
    have no worse answer."""
    folder = tmp_path_factory.mktemp("data")
    pairs = official_rows(folder, 10)
    for row in pairs[::2]:
        row["rejected"] = "no"
    write_lines(folder / "pairs.jsonl", pairs)
    text = [
        {"prompt": f"Say {'abcd'[i % 4]}", "gt": "abcd"[i % 4], "seconds": 1e-3} for i in range(60)
    ]
    return write_lines(folder / "rows.jsonl", official_rows(folder, 16) + text)


def file_of(data: str, kind: str) -> str:
    return data.replace("rows.jsonl", "pairs.jsonl") if "dpo" in kind else data


def a_run(base: str, data: str, out: Path, **more) -> loop.Run:
    chosen = settings(base, [data], out, **{**COMMON, "accumulate": 2, **more})
    return loop.Run(chosen, parallel.start("cpu"), loop.read_rows(chosen))


@pytest.fixture(scope="module")
def two(base, data, tmp_path_factory) -> Path:
    """Folder of the runs by two processes."""
    out = tmp_path_factory.mktemp("two")
    here = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    script = out / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--local-addr=127.0.0.1"]  # it would wait forever for a host name that is not known
    done = subprocess.run(
        [*command, str(script), base, data, str(out)],
        env=os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (out / "stderr").write_text(done.stderr)
    return out


def log_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def weights_of(run: loop.Run) -> dict[str, torch.Tensor]:
    # A bias of the keys moves all scores of a query alike: its gradient is rounding and nothing
    # else, which Adam makes as large as any other.
    return {
        name: p.detach()
        for name, p in run.trainee.named_parameters()
        if not name.endswith("k_proj.bias")
    }


def test_some_steps_have_sound_on_one_process_only(base, data, tmp_path) -> None:
    run = a_run(base, data, tmp_path)
    batches = run._plan(0)
    silent = [float(run.rows.seconds[batch].max()) < 0.1 for batch in batches]
    steps = list(zip(silent[0::2], silent[1::2], strict=False))[:4]
    assert any(a != b for a, b in steps), steps
    run = a_run(base, file_of(data, "dpo"), tmp_path, **PAIRS)
    pairs = [bool(run.loader[0, batch].pairs) for batch in run._plan(0)]
    steps = list(zip(pairs[0::2], pairs[1::2], strict=True))
    assert any(a != b for a, b in steps) and (False, False) in steps, steps


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(kind, two, base, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "EVERY", 0.0)
    data, more = file_of(data, kind), KINDS[kind]
    run = a_run(base, data, tmp_path / "one", **more)
    run.go()
    ours, theirs = log_of(tmp_path / "one"), log_of(two / kind)
    assert [line["step"] for line in theirs] == [1, 2, 3, 4]
    for a, b in zip(ours, theirs, strict=True):
        assert a["audio_seconds"] == pytest.approx(b["audio_seconds"])
        assert a["bad"] == b["bad"]
        for key in {"loss", "ctc", "norm", "margin"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)
    # Their last checkpoint, read by one process, holds our weights.
    shutil.copytree(two / kind, tmp_path / "theirs")
    found = weights_of(a_run(base, data, tmp_path / "theirs", **more))
    expected = weights_of(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    moved = weights_of(a_run(base, data, tmp_path / "fresh", **more))
    assert any((moved[name] - tensor).abs().max() > 1e-3 for name, tensor in expected.items())


def test_bad_rows_are_named_by_whichever_process_meets_them(two) -> None:
    bad = [log_of(two / kind)[-1]["bad"] for kind in ("dpo", "dpo-lora")]
    said = (two / "stderr").read_text().count("no rejected answer to compare with")
    assert min(bad) >= 3 and said == sum(bad)


def test_saved_on_two_and_gone_on_with_by_one(two, base, data, tmp_path) -> None:
    shutil.copytree(two / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-00000004")
    run = a_run(base, data, tmp_path / "half")
    assert run.progress.step == 2
    run.go()
    whole = a_run(base, data, tmp_path / "one")
    whole.go()
    for name, tensor in weights_of(whole).items():
        torch.testing.assert_close(weights_of(run)[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_the_result_is_whole(two) -> None:
    from qwen2audio_core.weights import load_model

    model = load_model(two / "whole" / "model")
    assert (model.config.audio, model.config.text) == (SHAPE.audio, SHAPE.text)
    assert model.audio_tower.conv1.weight.dtype == torch.bfloat16
    assert (two / "lora" / "adapter" / "adapter_model.safetensors").exists()
