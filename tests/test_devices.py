"""Everything a user does, on a device that is not the CPU: pretended here, real where there is one.

What each flow does is in on_a_device.py, which runs in a process of its own; what a pretended
device shows, in pretend_device.py.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import ROOT
from on_a_device import FLOWS, readme, trained

PRETENDED = ("pretend:cuda", "pretend:other")
pretends = pytest.mark.skipif(
    torch.cuda.is_available() or not find_spec("triton"),
    reason="a pretended device needs Triton's interpreter, and no GPU beside it",
)
reads = pytest.mark.skipif(not find_spec("soundfile"), reason="soundfile is not installed")


@cache
def start(device: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "on_a_device.py"), device]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@cache
def said(device: str) -> dict[str, dict[str, Any]]:
    if device in PRETENDED:
        for one in PRETENDED:  # side by side: each takes one core
            start(one)
    out, complaint = start(device).communicate()
    assert start(device).returncode == 0, complaint[-3000:]
    return {found["flow"]: found for found in map(json.loads, out.splitlines())}


def near(there: Any, here: Any) -> bool:
    """Equal, but for the rounding of two devices."""
    if isinstance(here, list):
        return len(there) == len(here) and all(map(near, there, here))
    return there == (pytest.approx(here, 0.01, 0.02) if isinstance(here, float) else here)


def cases() -> Iterator[Any]:
    """Every flow on every device, with what it needs."""
    for device, flows in FLOWS.items():
        marks = [pretends]
        if device == "cuda":
            marks = [pytest.mark.gpu]
        if device == "mps":
            here = torch.backends.mps.is_available()
            marks = [pytest.mark.skipif(not here, reason="torch sees no GPU of Apple's")]
        for flow in flows:
            needs = [*marks, reads] if flow in (readme, trained) else marks
            yield pytest.param(device, flow.__name__, marks=needs, id=f"{device}-{flow.__name__}")


@pytest.mark.parametrize(("device", "flow"), list(cases()))
def test_the_device_does_what_the_cpu_does(device: str, flow: str) -> None:
    found = said(device)[flow]
    assert "error" not in found, found["error"]
    assert near(found["there"], found["here"]), (found["there"], found["here"])


@pretends
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("angles_on_the_cpu", "on two devices"),
        ("a_step_that_waits", "waits for the device"),
        ("a_step_that_asks_the_host", "from device to device"),
    ],
)
def test_a_mistake_that_a_cpu_forgives_is_found(mistake: str, message: str) -> None:
    assert message in said("pretend:cuda")[mistake]["error"]
