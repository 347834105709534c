"""A kernel takes the place of its plain op, so both have one name and one signature."""

import inspect
import subprocess
import sys
from pathlib import Path

import interpreter  # noqa: F401 - before the kernels are defined
import pytest

import qwen2audio_kernels as kernels
from qwen2audio_core import ops

FILES = Path(kernels.__file__).parent
SHARED = sorted(name for name in kernels.OPS if hasattr(ops, name))


def test_the_ops_of_the_model_are_here() -> None:
    slots = {"rms_norm", "layer_norm", "rope", "swiglu", "gelu", "attention", "cross_entropy"}
    assert slots <= set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_signature(name: str) -> None:
    assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(kernels, name))


@pytest.mark.parametrize("name", kernels.OPS)
def test_a_name_means_the_op_even_after_its_file_was_imported(name: str) -> None:
    __import__(f"qwen2audio_kernels.{kernels.OPS[name]}")
    op = getattr(kernels, name)
    assert inspect.isfunction(op)
    assert op.__name__ == name


def test_every_file_is_named() -> None:
    files = {file.stem for file in FILES.glob("*.py") if not file.stem.startswith("_")}
    assert files == set(kernels.OPS.values())


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'softmax'"):
        kernels.softmax  # noqa: B018


def test_available_says_on_what() -> None:
    answer = kernels.available()
    assert answer
    assert answer.reason


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(FILES.parent), "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_triton() -> None:
    code = "import sys, qwen2audio_kernels; print({'torch', 'triton'} & set(sys.modules))"
    assert run(code) == "set()"


def test_without_a_gpu_or_triton_it_says_why_not() -> None:
    ask = "from qwen2audio_kernels import available as a; print(bool(a()), a().reason)"
    assert run(ask, TRITON_INTERPRET="0").startswith("False torch ")
    hidden = "import importlib.util as u; f = u.find_spec; "
    hidden += "u.find_spec = lambda name: None if name == 'triton' else f(name); "
    assert "triton is not installed" in run(hidden + ask)


@pytest.mark.parametrize(
    ("arch", "able"),
    [
        ("sm_80", False),
        ("sm_90", True),
        ("sm_120", True),
        ("gfx942", False),
        ("interpreter", False),
    ],
)
def test_which_gpus_overlap_kernels(arch: str, able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2audio_kernels import _launch
    from qwen2audio_kernels.linear import linear_fwd_kernel
    from qwen2audio_kernels.swiglu import swiglu_fwd_kernel

    expected = {"OVERLAP": True, "launch_pdl": True} if able else {"OVERLAP": False}
    assert _launch.overlap(linear_fwd_kernel, arch) == expected
    assert _launch.overlap(swiglu_fwd_kernel, arch) == {}
    monkeypatch.setattr(_launch, "OVERLAPPING", False)
    assert _launch.overlap(linear_fwd_kernel, arch) == {"OVERLAP": False}
