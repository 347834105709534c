"""scripts/train_tiny.sh: what it refuses, before it installs or writes anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("part", ["0", "2", "-0.1", "1e-3", "a"])
def test_a_part_that_is_none_is_one_line(part: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    script = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "train_tiny.sh"), str(tmp_path / "run")],
        env=os.environ | {"TINY_PART": part},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert script.returncode == 1
    assert script.stdout == f"error: TINY_PART is {part}: above 0 and at most 1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]
