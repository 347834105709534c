"""Which function fills each op slot of a model.

A slot is an attribute whose name ends in `_op` (`grep _op` lists them). It holds a plain function,
so setting it by hand is a backend too: `layer.self_attn.attention_op = mine`. `use` does the same
for many modules at once and puts back what was there.
"""

import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import nn

from qwen2audio_core import ops
from qwen2audio_core.errors import InputError
from qwen2audio_core.linear import Linear
from qwen2audio_core.packed_linear import PackedLinear, why_not_packed

Op = Callable[..., Any]

# What a slot is called in the model, and what fills it besides a kernel. A class is made anew for
# every layer, because it keeps something of it.
PLAIN: dict[str, dict[str, Op | type]] = {
    "attention": {"torch": ops.sdpa, "eager": ops.attention},
    "gelu": {"torch": ops.gelu},
    "layer_norm": {"torch": ops.layer_norm},
    "linear": {"torch": F.linear, "packed": PackedLinear},
    "rms_norm": {"torch": ops.rms_norm},
    "rope": {"torch": ops.rope},
    "swiglu": {"torch": ops.swiglu},
}


def is_attention(function: object) -> bool:
    """Whether a slot's function is ops.attention in one of its versions, not one of your own."""
    kernel = getattr(function, "__module__", "").startswith("qwen2audio_kernels")
    return kernel or function in (*PLAIN["attention"].values(), ops.attention_by_products)


class Backend:
    """Slots that were filled, and what they held before. Use it with `with`, or call `restore`.

    chosen   op -> "triton", "torch", "eager", "packed" or "custom"
    reason   why "auto" chose as it did
    """

    def __init__(self, chosen: dict[str, str], reason: str = ""):
        self.chosen = chosen
        self.reason = reason
        self._before: list[tuple[nn.Module, str, Op]] = []

    def restore(self) -> None:
        """Put back what every slot held."""
        while self._before:
            module, slot, function = self._before.pop()
            setattr(module, slot, function)

    def __enter__(self) -> "Backend":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        picked = ", ".join(f"{op}: {name}" for op, name in self.chosen.items())
        return f"{picked} ({self.reason})" if self.reason else picked


def use(
    model: nn.Module, every: str | None = None, *, layers: str = "*", **choice: str | Op
) -> Backend:
    """Fill op slots of a model.

        backends.use(model, "triton")                               every op
        backends.use(model, attention="eager", rms_norm=my_norm)    these, the rest as it is
        with backends.use(model, "triton", layers="audio_tower.layers.0-3"): ...

    every    "torch", "triton" or "auto", for the ops not named in `choice`; "auto" is Triton where
             it can run, else torch with packed weights where those pay, and the result's `reason`
             says why. Linear layers stay with the library's products unless named
    layers   dotted path of modules; * matches within a name, 0-3 a range of numbers. What lies
             below a matching module counts too
    choice   op=backend or op=function; a function takes the arguments of the op in ops.py
    returns  what was chosen; restores on `restore` or at the end of a `with`
    errors   InputError for an unknown op, a backend that cannot run here, or layers without slots
    """
    chosen: dict[str, str] = {}
    functions: dict[str, Op] = {}
    reason = ""
    automatic = every == "auto"
    if every not in (None, "auto", "torch", "triton"):
        raise InputError(f"there is no backend {every!r} for every op: 'torch', 'triton' or 'auto'")
    if automatic:
        kernels, reason = find_kernels()
        every = "torch" if kernels is None else "triton"
    defaults = dict.fromkeys(PLAIN, every)
    if automatic or every == "triton":
        defaults["linear"] = "packed" if automatic and not _why_not_packed(model) else "torch"
    for op in PLAIN:
        wanted = choice.pop(op, defaults[op])
        if wanted is not None:
            chosen[op] = wanted if isinstance(wanted, str) else "custom"
            functions[op] = _function(op, wanted, model)
    if choice:
        raise InputError(f"unknown op {next(iter(choice))!r}, a model has {', '.join(PLAIN)}")
    backend = Backend(chosen, reason)
    pattern = path_pattern(layers)
    for path, module in model.named_modules():
        if pattern.fullmatch(path):
            for op, function in functions.items():
                if f"{op}_op" in vars(module):
                    backend._before.append((module, f"{op}_op", vars(module)[f"{op}_op"]))
                    filling = function() if isinstance(function, type) else function
                    setattr(module, f"{op}_op", filling)
    if functions and not backend._before:
        raise InputError(
            f"layers={layers!r} matches no module with a slot for {', '.join(functions)}"
        )
    return backend


def _why_not_packed(model: nn.Module) -> str:
    layer = next((module for module in model.modules() if isinstance(module, Linear)), None)
    return "there is no linear layer" if layer is None else why_not_packed(layer.weight)


def _function(op: str, wanted: str | Op, model: nn.Module) -> Op:
    if not isinstance(wanted, str):
        if not callable(wanted) or isinstance(wanted, nn.Module):
            raise InputError(
                f"{op} is a {type(wanted).__name__}, it must be a backend's name or a function"
                " (of a module its `forward`)"
            )
        return wanted
    if wanted == "packed" and op == "linear" and (reason := _why_not_packed(model)):
        raise InputError(f"packed weights cannot be used: {reason}")
    if wanted in PLAIN[op]:
        return PLAIN[op][wanted]
    if wanted != "triton":
        known = [*PLAIN[op], "triton"]
        raise InputError(f"{op} has no backend {wanted!r}, choose {', '.join(known)} or a function")
    function: Op = getattr(triton_kernels(), op)
    return function


def find_kernels() -> tuple[Any, str]:
    """The package qwen2audio_kernels where it can run, else None; and why, in a sentence."""
    try:
        import qwen2audio_kernels
    except ImportError:
        return None, "the package qwen2audio_kernels is not installed"
    found = qwen2audio_kernels.available()
    return qwen2audio_kernels if found else None, found.reason


def triton_kernels() -> Any:
    """The package qwen2audio_kernels; InputError where it cannot run."""
    found, reason = find_kernels()
    if found is None:
        raise InputError(f"the Triton kernels cannot run here: {reason}")
    return found


def path_pattern(layers: str, below: bool = True) -> re.Pattern[str]:
    """A dotted pattern as a regular expression: * is any name, 2-5 is 2, 3, 4 or 5.

    below  also match what lies below a matching module, and everything with a lone *
    """
    if layers == "*" and below:
        return re.compile(".*", re.DOTALL)
    parts = []
    for part in layers.split("."):
        span = re.fullmatch(r"(\d+)-(\d+)", part)
        if span:
            numbers = range(int(span[1]), int(span[2]) + 1)
            parts.append("(?:" + "|".join(map(str, numbers)) + ")" if numbers else "(?!)")
        else:
            parts.append("[^.]*".join(re.escape(piece) for piece in part.split("*")))
    return re.compile(r"\.".join(parts) + (r"(?:\..*)?" if below else ""))
