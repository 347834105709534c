"""Folders that one run at a time writes to."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen2audio_core.errors import InputError
from qwen2audio_core.holding import held

fcntl = pytest.importorskip("fcntl", reason="this system has no such locks")

HOLD = """
import sys, time
from pathlib import Path
from qwen2audio_core.holding import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with held(folder):
        (folder / "file").write_text("")
        with pytest.raises(InputError, match="run: another run is writing there"), held(folder):
            raise AssertionError("both are in")
    with held(folder):
        assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_process_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run"), held(tmp_path):
            pass
        other.kill()
        other.wait()
    with held(tmp_path):
        pass


def test_a_folder_that_stays_empty_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with held(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="cannot be made"), held(place):
            pass


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path: Path, monkeypatch) -> None:
    def unknown(*args: object) -> None:
        raise OSError("no locks on this disk")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with held(tmp_path), held(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with held(tmp_path), held(tmp_path):
        pass
