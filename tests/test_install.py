"""Messages name a command that installs what is missing, wherever this package came from."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qwen2audio_core import install

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "qwen2audio_core"


def test_from_a_checkout_it_is_the_form_of_the_readme():
    said = shlex.split(install.extra("web"))
    pip = [sys.executable, "-m", "pip", "install"]
    assert said == [*pip, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[web]"]


def test_names_that_a_shell_would_split_are_quoted(tmp_path, monkeypatch):
    root = tmp_path / "it's a folder"
    root.mkdir()
    (root / "constraints.txt").touch()
    monkeypatch.setattr(install, "ROOT", root)
    monkeypatch.setattr(sys, "executable", "/my programs/python")
    assert install.extra("web") == "'/my programs/python' -m pip install 'qwen2audio[web]'"
    (root / "pyproject.toml").touch()
    script = 'printf "%s\\n" ' + install.extra("web")
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout.splitlines()
    assert words[0] == "/my programs/python"
    assert words[4:] == ["-c", f"{root}/constraints.txt", "-e", f"{root}[web]"]


@pytest.mark.parametrize("executable", ["", None])
def test_installed_and_other_packages(tmp_path, monkeypatch, executable):
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", executable)
    assert install.extra("av") == "python -m pip install 'qwen2audio[av]'"
    assert install.package("transformers") == "python -m pip install transformers"


def test_messages_ask_it_for_extras_that_exist():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = {path: path.read_text(encoding="utf-8") for path in CORE.rglob("*.py")}
    named = re.findall(r"install\.extra\(['\"](\w+)['\"]\)", "".join(texts.values()))
    assert len(named) >= 7 and set(named) <= set(known)
    own = CORE / "install.py"
    assert [path for path, text in texts.items() if "'qwen2audio[" in text and path != own] == []


def test_it_imports_nothing_heavy():
    code = (
        "import sys, qwen2audio_core.install; print({'torch', 'numpy', 'typer'} & {*sys.modules})"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout == "set()\n", said.stderr
