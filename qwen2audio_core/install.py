"""The commands that install what is missing, for messages to name."""

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the source checkout, where this is one


def extra(name: str) -> str:
    """The command for one of this package's extras, ready to be pasted into a shell."""
    tested = _tested_versions()
    if tested:
        return _pip(*tested, "-e", f"{ROOT}[{name}]")
    return _pip(f"qwen2audio[{name}]")


def package(name: str) -> str:
    """The command for another package, in a checkout in the version that is tested there."""
    return _pip(*_tested_versions(), name)


def _tested_versions() -> tuple[str, ...]:
    constraints = ROOT / "constraints.txt"
    checkout = constraints.is_file() and (ROOT / "pyproject.toml").is_file()
    return ("-c", str(constraints)) if checkout else ()


def _pip(*words: str) -> str:
    return shlex.join([sys.executable or "python", "-m", "pip", "install", *words])
