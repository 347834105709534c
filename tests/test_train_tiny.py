"""scripts/train_tiny.sh from nothing to figures, on a little of its data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from ctypes.util import find_library
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VOICE = Path("/usr/share/festival/voices/us/cmu_us_slt_arctic_hts")
STAGES = ("pretrain", "sft", "short", "dpo")
LITTLE = {
    "TINY_PART": "0.001",
    "PRETRAIN_MINUTES": "0.1",
    "SFT_MINUTES": "0.1",
    "SHORT_MINUTES": "0.1",
    "DPO_MINUTES": "0.1",
}


def start(root: Path, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(root / "scripts" / "train_tiny.sh"), str(root / "run")],
        env=os.environ | LITTLE | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts and the package, with this Python as an environment that is installed."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("qwen2audio_core", "kernels", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in (("python", ""), ("qwen2audio", " -m qwen2audio_core")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (programs / name).chmod(0o755)
    ready = 'source "$0/scripts/_environment.sh"; printf "%s test" "$(environment_key)"'
    key = subprocess.run(["bash", "-c", ready, str(tmp_path)], capture_output=True, check=True)
    (tmp_path / ".venv" / "ready").write_bytes(key.stdout)
    return tmp_path


@pytest.mark.parametrize("part", ["0", "2", "-0.1", "1e-3", "a"])
def test_a_part_that_is_none_is_one_line(part: str, checkout: Path) -> None:
    script = start(checkout, TINY_PART=part)
    printed, _ = script.communicate(timeout=60)
    assert script.returncode == 1
    assert printed == f"error: TINY_PART is {part}: above 0 and at most 1\n"
    assert not (checkout / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_library("espeak-ng") and find_library("flite") and VOICE.is_dir()),
    reason="needs espeak-ng, flite and festival (apt install espeak-ng flite festvox-us-slt-hts)",
)
def test_all_of_it_in_little_broken_off_and_gone_on(checkout: Path) -> None:
    out = checkout / "run"
    for reached in (out / "data" / "sft.jsonl", out / "pairs.jsonl"):
        script = start(checkout)
        printed = []
        reader = threading.Thread(target=lambda to=printed, of=script: to.extend(of.stdout))
        reader.start()
        deadline = time.monotonic() + 600
        try:
            while not reached.exists() and script.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            running = script.poll() is None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
        reader.join(60)
        script.wait(60)
        assert running and reached.exists(), "".join(printed)
    script = start(checkout)
    printed, _ = script.communicate(timeout=900)
    assert script.returncode == 0, printed
    assert "sft.jsonl is there" in printed and f"going on from {out}/sft/checkpoint" in printed
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 30 and len({pair["task"] for pair in pairs}) > 4
    for stage in STAGES:
        figures = json.loads((out / f"{stage}.json").read_text())
        assert {"wer.en", "cer.ja", "wer.unseen_engine", "accuracy.voice_chat"} <= figures.keys()
        # That of the data, all of it and nothing twice.
        assert figures["rows"]["accuracy.several_clips"] == 10
        assert figures["rows"]["wer.unseen_engine"] == 4
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    written |= {path: path.stat().st_mtime_ns for path in out.glob("*.json*")}
    assert len(written) == 10
    again = start(checkout)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "what dpo has achieved" not in printed, printed
    assert {path: path.stat().st_mtime_ns for path in written} == written
    other, _ = start(checkout, TINY_PART="0.5").communicate(timeout=60)
    assert other.splitlines()[-1].endswith("was begun with TINY_PART=0.001: take another folder")
