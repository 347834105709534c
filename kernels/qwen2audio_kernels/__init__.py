"""Triton kernels for the ops of Qwen2-Audio. Needs torch and triton; works without the model.

    import qwen2audio_kernels as kernels
    y = kernels.rms_norm(x, weight, eps)

Every op has the name and the signature of its plain version, for most in qwen2audio_core/ops.py. It
takes float32, float16 and bfloat16 (log_mel float32 alone) and differentiates where its file says
so. Importing this package imports neither torch nor triton: an op's file is loaded when the op is
first named.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Op -> the file that holds it.
OPS = {
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "add_layer_norm": "layer_norm",
    "rope": "rope",
    "rope_into_cache": "rope",
    "swiglu": "swiglu",
    "gelu": "gelu",
    "bias_gelu": "gelu",
    "cross_entropy": "cross_entropy",
    "attention": "attention",
    "attention_varlen": "attention",
    "decode_attention": "decode_attention",
    "linear": "linear",
    "log_mel": "log_mel",
    "sample": "sample",
}


@dataclass(frozen=True)
class Availability:
    """Whether the kernels can run here; `reason` is a sentence either way. Usable as a bool."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def available() -> Availability:
    """Whether Triton can run the kernels on this machine, and on what or why not."""
    if find_spec("triton") is None:
        return Availability(False, "the package triton is not installed: pip install triton")
    import torch
    import triton

    if triton.knobs.runtime.interpret:
        return Availability(
            True, "Triton's interpreter (TRITON_INTERPRET=1): on the CPU, for tests"
        )
    if not torch.cuda.is_available():
        return Availability(False, f"torch {torch.__version__} sees no GPU, and Triton needs one")
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if torch.version.hip is None and major < 8:
        return Availability(
            False, f"{name} has compute capability {major}.{minor}; the kernels need 8.0 or newer"
        )
    return Availability(True, f"{name}, Triton {triton.__version__}")


def __getattr__(name: str) -> Any:
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{OPS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *OPS])


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # After loading a file, the import system binds the module to its name in the package. Where
        # an op has that name too, `qwen2audio_kernels.rms_norm` has to go on meaning the op.
        if name in OPS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
