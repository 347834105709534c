"""What the kernels share around a launch: checks, row views, block sizes. No mathematics."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton decides when a kernel is defined whether it will be compiled or interpreted.
INTERPRETED: bool = triton.knobs.runtime.interpret


# --- checks: one clear ValueError each ----------------------------------------------------------


def check(condition: bool, op: str, problem: str) -> None:
    """Raise ValueError(f"{op}: {problem}") unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {problem}")


def check_floats(op: str, **tensors: Tensor) -> None:
    """All of one dtype that the kernels take, on one device where they can run."""
    first, x = next(iter(tensors.items()))
    check(
        x.dtype in DTYPES,
        op,
        f"{first} is {_short(x.dtype)}; the kernel takes float32, float16 or bfloat16, "
        "other types need the plain op",
    )
    for name, tensor in tensors.items():
        check(
            tensor.dtype == x.dtype,
            op,
            f"{name} is {_short(tensor.dtype)} but {first} is {_short(x.dtype)}; "
            "convert them to one dtype",
        )
    check_device(op, **tensors)


def check_integers(op: str, **tensors: Tensor) -> None:
    """All int32 or int64. Their device is checked by `check_device`."""
    for name, tensor in tensors.items():
        check(
            tensor.dtype in (torch.int32, torch.int64),
            op,
            f"{name} is {_short(tensor.dtype)}, expected int32 or int64",
        )


def check_device(op: str, **tensors: Tensor) -> None:
    """All on one device, and that a GPU, or any device under Triton's interpreter."""
    first, x = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check(
            tensor.device == x.device,
            op,
            f"{name} is on {tensor.device} but {first} is on {x.device}; move them to one device",
        )
    check(
        x.is_cuda or INTERPRETED,
        op,
        f"{first} is on {x.device}; the kernel needs a GPU, the plain op runs anywhere",
    )


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Exactly this shape; `meaning` says where it comes from, e.g. "the last axis of x"."""
    check(
        tuple(tensor.shape) == tuple(shape),
        op,
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} ({meaning})",
    )


def check_scales(op: str, shape: tuple[int, ...], **scales: Tensor | None) -> None:
    """What an int8 cache needs: float32, one number a position and head."""
    for name, scale in scales.items():
        check(scale is not None, op, f"an int8 cache needs {name}")
        assert scale is not None
        check_shape(op, name, scale, shape, "one a position and head of the cache")
        dtype = f"{name} is {scale.dtype}, expected torch.float32"
        check(scale.dtype == torch.float32, op, dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- views --------------------------------------------------------------------------------------


def rows(x: Tensor) -> Tensor:
    """(..., D) as (R, D) with unit stride along D, so that a kernel needs one stride, stride(0).

    A view where the leading axes fold into one (a contiguous tensor, a slice of its last axis such
    as one half of a fused gate and up); otherwise a copy.
    """
    x = x if x.dim() else x.view(1)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])


# --- block sizes --------------------------------------------------------------------------------

# One program holds a whole row in registers; the backward pass of the norms spills above this.
MAX_ROW = 8192


def row_block(op: str, width: int) -> tuple[int, int]:
    """(BLOCK, num_warps) for a kernel that holds one row of `width` elements in one program."""
    check(
        width <= MAX_ROW,
        op,
        f"rows of {width} elements; the kernel holds up to {MAX_ROW}, more need the plain op",
    )
    block = max(triton.next_power_of_2(width), 16)
    return block, max(block // 512, 1)  # 16 elements a thread; at most 16 warps


@cache
def _table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads((Path(__file__).parent / "tuned.json").read_text())


@cache
def settings(kernel: str, arch: str) -> Mapping[str, int]:
    """Block sizes and launch options of a kernel on an architecture, from the table tuned.json:

        {kernel: {"default": {BLOCK_M: 128, ..., "num_warps": 4}, "sm_86": {overrides}, ...}}

    kernel  a key of the table, e.g. "attention_fwd_64"
    arch    what `arch` returns for a tensor, or a target of ahead-of-time compilation
    returns the default with the architecture's overrides; KeyError for an unknown kernel
    """
    if kernel not in _table():
        raise KeyError(f"tuned.json has no block sizes for {kernel!r}")
    entry = _table()[kernel]
    return MappingProxyType({**entry["default"], **entry.get(arch, {})})


def arch(device: torch.device) -> str:
    """The GPU's architecture: sm_90, gfx942, ...; interpreter under Triton's interpreter."""
    return "interpreter" if INTERPRETED else _arch(device.index or 0)


@cache
def _arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the GPU; a handful under the interpreter."""
    if INTERPRETED:
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- overlap ------------------------------------------------------------------------------------

# A step of decoding is some three hundred kernels of ten microseconds, each of which waits for the
# last program of the one in front of it. From sm_90 on a GPU can start the next one's programs in
# the places that become free meanwhile (programmatic dependent launch); they wait where they say.
OVERLAPPING = os.environ.get("QWEN2AUDIO_NO_OVERLAP", "0") in ("", "0")


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """The first line of a kernel that takes OVERLAP, before it reads or writes anything.

    Everything in front of this kernel has ended behind it, and the next one may be started.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlap(kernel: Any, arch: str) -> dict[str, bool]:
    """Launch options of a kernel that may start before the one in front of it has ended."""
    if "OVERLAP" not in kernel.arg_names:
        return {}
    able = OVERLAPPING and arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90
    return {"OVERLAP": able, "launch_pdl": True} if able else {"OVERLAP": False}


# --- launch -------------------------------------------------------------------------------------


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options) on the GPU of the first argument, a tensor.

    Launches nothing where the grid is empty (no rows). Fused multiply-add is asked for by name
    because its default changes with Triton 3.10. Call it as `_launch.launch`: ahead-of-time
    compilation puts a recorder in its place.
    """
    if 0 in grid:
        return
    device = arguments[0].device
    options |= overlap(kernel, arch(device))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, enable_fp_fusion=True, **options)
    else:
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


def launch_columns(
    name: str,
    kernel: Any,
    inputs: Sequence[Tensor],
    others: Sequence[Tensor | None],
    **constants: Any,
) -> None:
    """Launch a kernel whose programs take BLOCK columns of one row each, with its settings.

    kernel(inputs as rows ..., others ..., row stride of each input ..., width, constants, BLOCK)

    name    the kernel's key in tuned.json
    inputs  (..., D), all of one shape
    """
    views = [rows(x) for x in inputs]
    count, width = views[0].shape
    options = settings(name, arch(views[0].device))
    grid = (count, triton.cdiv(width, options["BLOCK"]))
    strides = [view.stride(0) for view in views]
    launch(kernel, grid, *views, *others, *strides, width, **constants, **options)


def launch_norm(
    op: str,
    kernel: Any,
    x: Tensor,
    residual: Tensor | None,
    weights: Sequence[Tensor],
    eps: float,
    statistics: int,
) -> tuple[Tensor, Tensor | None, list[Tensor], dict[str, Any]]:
    """Launch a norm whose programs hold one row each, forward.

    kernel(x, residual, weights ..., sum, y, statistics ..., row strides, width, eps)

    op          for errors; with a residual, add_ is put before it
    statistics  how many float32 numbers of each row are kept for the backward pass
    returns     y; x + residual or None; the statistics, (R,) each; the launch's constants
    """
    block, num_warps = row_block(op if residual is None else f"add_{op}", x.shape[-1])
    constants = {"HAS_RESIDUAL": residual is not None, "BLOCK": block, "num_warps": num_warps}
    x_rows = rows(x)
    residual_rows = None if residual is None else rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(y)
    kept = [x.new_empty(len(x_rows), dtype=torch.float32) for _ in range(statistics)]
    strides = (x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0))
    launch(
        kernel, (len(x_rows),), x_rows, residual_rows, *weights, summed, y, *kept,
        *strides, x.shape[-1], eps, **constants,
    )  # fmt: skip
    return y, summed, kept, constants


def launch_norm_backward(
    kernel: Any,
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    statistics: Sequence[Tensor],
    gradients: int,
    constants: Mapping[str, Any],
) -> tuple[Tensor, list[Tensor]]:
    """Launch its backward pass: a program walks many rows and keeps sums over them.

    kernel(dy, dsum, x, weight, statistics ..., dx, sums ..., row strides, rows, width)

    dsum       the gradient that reaches x + residual from elsewhere
    gradients  how many sums over the rows there are, for weight and bias
    returns    dx; the sums (D,) in the weight's dtype, added in a fixed order
    """
    x_rows, dy_rows = rows(x), rows(dy)
    dsum_rows = None if dsum is None else rows(dsum)
    count, width = x_rows.shape
    programs = min(count, 2 * processors(x.device))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = [x.new_empty(programs, width, dtype=torch.float32) for _ in range(gradients)]
    strides = (dy_rows.stride(0), 0 if dsum_rows is None else dsum_rows.stride(0), x_rows.stride(0))
    launch(
        kernel, (programs,), dy_rows, dsum_rows, x_rows, weight, *statistics, dx, *sums,
        *strides, count, width, **constants,
    )  # fmt: skip
    return dx, [one.sum(0).to(weight.dtype) for one in sums]
