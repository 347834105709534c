"""The two commands of the README, run with a pretended Python, and what the package contains."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

TOOLS = ("bash", "sh", "dirname", "cat", "cksum", "rm", "mkdir", "cp", "touch", "sleep")
# Writes its calls to the file $LOG; `-m venv DIR` puts a copy of itself into DIR/bin.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in
    *version_info*) exit "${OLD:-0}" ;;
    *ensurepip*) exit "${BARE:-0}" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*) sleep "${SLOW:-0}"; exit "${BROKEN:-0}" ;;
    --version) echo "Python 3.${MINOR:-11}.0" ;;
esac
"""


class Checkout:
    """A copy of the scripts that finds nothing on PATH but a few tools and a pretended Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.log = folder / "log"
        self.environment = self.root / ".venv"
        self.tools = folder / "tools"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        self.tools.mkdir()
        for tool in TOOLS:
            self.add(tool)
        python = self.tools / "python3"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)

    def add(self, tool: str) -> None:
        (self.tools / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool} here"))

    def prepare(self, extra: str = "", **settings: str) -> tuple[int, str, list[str]]:
        """Exit code, what was printed, and the calls that change the environment."""
        self.log.write_text("")
        done = self.start(extra, **settings)
        printed, _ = done.communicate(timeout=60)
        calls = [line for line in self.log.read_text().splitlines() if line.startswith("-m ")]
        return done.returncode, printed, calls

    def start(self, extra: str, **settings: str) -> subprocess.Popen[str]:
        script = 'set -euo pipefail; source "$1/scripts/_environment.sh"; prepare_environment $2'
        return subprocess.Popen(
            ["bash", "-c", script, "_", str(self.root), extra],
            env={"PATH": str(self.tools), "LOG": str(self.log), **settings},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_run_installs_and_second_does_not(checkout: Checkout) -> None:
    code, printed, calls = checkout.prepare()
    assert code == 0
    assert [call.split()[1] for call in calls] == ["venv", "pip"]
    assert f"--constraint {checkout.root}/constraints.txt" in calls[1]
    assert calls[1].endswith(f"--editable {checkout.root}")
    assert all(line.startswith("==> ") for line in printed.splitlines())

    code, printed, calls = checkout.prepare()
    assert (code, calls) == (0, [])
    assert printed == f"==> environment {checkout.environment} is ready\n"


def test_the_test_extra_is_added_once_and_serves_the_demo_too(checkout: Checkout) -> None:
    checkout.prepare()
    _, _, calls = checkout.prepare("test")
    assert len(calls) == 1 and calls[0].endswith(f"--editable {checkout.root}[test]")
    assert checkout.prepare("test")[2] == []
    assert checkout.prepare()[2] == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "python", "folder"])
def test_a_change_installs_again(changed: str, checkout: Checkout) -> None:
    checkout.prepare()
    settings = {}
    if changed == "python":
        settings = {"MINOR": "12"}
    elif changed == "folder":
        checkout.root = checkout.root.rename(checkout.root.with_name("elsewhere"))
    else:
        with open(checkout.root / changed, "a") as file:
            file.write("# changed\n")
    assert len(checkout.prepare(**settings)[2]) == 1


def test_a_failed_installation_is_started_over(checkout: Checkout) -> None:
    code, printed, _ = checkout.prepare(BROKEN="1")
    assert code == 1 and "the installation failed" in printed
    left = checkout.environment / "half-installed"
    left.touch()
    code, printed, calls = checkout.prepare()
    assert code == 0 and "starting over" in printed
    assert [call.split()[1] for call in calls] == ["venv", "pip"]
    assert not left.exists()


def test_of_two_runs_at_once_one_installs(checkout: Checkout) -> None:
    checkout.add("flock")
    runs = [checkout.start("", SLOW="1") for _ in range(2)]
    printed = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted("is ready" in text for text in printed) == [False, True]
    assert checkout.log.read_text().count("-m pip install") == 1


def test_an_environment_that_someone_else_made_is_kept(checkout: Checkout) -> None:
    checkout.environment.mkdir()
    mine = checkout.environment / "mine"
    mine.touch()
    code, printed, calls = checkout.prepare()
    assert code == 1 and "no working Python" in printed and calls == []
    assert mine.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"OLD": "1"}, "no Python of 3.11 to 3.14"), ({"BARE": "1"}, "install its venv module")],
)
def test_an_unsuitable_python_is_named(
    settings: dict[str, str], message: str, checkout: Checkout
) -> None:
    code, printed, calls = checkout.prepare(**settings)
    assert code == 1 and calls == []
    assert message in printed and len(printed.splitlines()) == 1
    assert not checkout.environment.exists()


@pytest.mark.parametrize("minor", range(10, 16))
def test_which_versions_of_python_suit(minor: int, checkout: Checkout) -> None:
    """By the scripts' own words, run by this Python with another version's number."""
    pretend = f"import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv[1])"
    python = checkout.tools / "python3"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{pretend}' \"$2\"\n")
    found = subprocess.run(
        ["bash", "-c", f"source '{checkout.root}/scripts/_environment.sh'; find_python"],
        env={"PATH": str(checkout.tools)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stdout.strip() == ("python3" if 11 <= minor <= 14 else ""), found.stderr
    assert ("no Python of 3.11 to 3.14" in found.stderr) == (not found.stdout)


def test_every_requirement_is_pinned_inside_its_range() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[re.sub("[-_.]+", "-", name).lower()] = version
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        wanted = requirements.Requirement(text)
        if wanted.name != PROJECT["name"]:
            assert wanted.specifier.contains(pins[wanted.name]), text


def test_the_wheel_holds_both_packages_and_the_assets(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for base in (ROOT, ROOT / "kernels"):
        for package in ("qwen2audio_core", "qwen2audio_kernels"):
            for path in (base / package).rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    expected.add(path.relative_to(base).as_posix())
    assert held == expected
    assert any(name.startswith("qwen2audio_core/assets/clips/") for name in held)


@pytest.mark.parametrize("script", ["scripts/demo.sh", "scripts/test.sh", ".ci/run"])
def test_scripts_are_sound_bash(script: str) -> None:
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=10)


def test_the_demo_asks_about_clips_that_ship() -> None:
    text = (ROOT / "scripts/demo.sh").read_text()
    (folder,) = re.findall(r'clips="\$root/(\S+)"', text)
    names = re.findall(r"\$clips/(\w+)\.flac", text) + re.findall(r"\b[a-z]{2}:(\w+)", text)
    assert len(names) == 6
    assert all((ROOT / folder / f"{name}.flac").is_file() for name in names), names


def test_the_demo_says_once_what_its_model_is(checkout: Checkout) -> None:
    checkout.prepare()
    command = checkout.environment / "bin" / "qwen2audio"
    command.write_text('#!/bin/sh\necho "$1 ${QWEN2AUDIO_NO_NOTICE:-said}" >>"$LOG"\n')
    command.chmod(0o755)
    checkout.log.write_text("")
    subprocess.run(
        ["bash", str(checkout.root / "scripts" / "demo.sh")],
        env={"PATH": str(checkout.tools), "LOG": str(checkout.log)},
        check=True,
        capture_output=True,
        timeout=60,
    )
    calls = [line for line in checkout.log.read_text().splitlines() if line[:3] in ("ask", "tra")]
    assert calls == ["ask said", "ask 1", "ask 1", *["transcribe 1"] * 3]
