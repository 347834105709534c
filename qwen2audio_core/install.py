"""The commands that install what is missing, for messages to name."""

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the source checkout, where this is one


def extra(name: str) -> str:
    """The command for one of this package's extras, ready to be pasted into a shell."""
    constraints = ROOT / "constraints.txt"
    if constraints.is_file() and (ROOT / "pyproject.toml").is_file():
        return _pip("-c", str(constraints), "-e", f"{ROOT}[{name}]")
    return _pip(f"qwen2audio[{name}]")


def package(name: str) -> str:
    """The command for another package, in the version that the project is tested with."""
    constraints = ROOT / "constraints.txt"
    return _pip(*(["-c", str(constraints)] if constraints.is_file() else []), name)


def _pip(*words: str) -> str:
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *words])
