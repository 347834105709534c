"""Triton kernels on a machine without a GPU: import this before anything that defines a kernel.

    from interpreter import DEVICE

Where torch sees no GPU this switches Triton to its interpreter and repairs it for bfloat16, so that
the kernels run unmodified on CPU tensors. Where there is a GPU it changes nothing.

What is repaired, in Triton 3.6 to 3.9: bfloat16 values are kept as raw 16-bit patterns, and
arithmetic, dot and casts are done on the patterns as if they were integers, or truncate instead of
rounding; a loop over a run-time range needs a conversion that NumPy 2.4 no longer makes; and NumPy
warns of overflows that a GPU takes in silence.

What a GPU would do wrong in silence fails: reading or writing outside every tensor, and using what
a masked load left out and had no `other` for, which is NaN here.
"""

import inspect
import os
from typing import Any

import pytest
import torch

# Several threads in NumPy's matrix product, on small tiles beside torch's own threads, make the
# interpreter an order of magnitude slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

# A test file that imports this one is skipped whole where there is no Triton.
pytest.importorskip("triton")

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


def widen(patterns: np.ndarray) -> np.ndarray:
    """bfloat16 patterns (uint16) -> float32, exact."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float -> bfloat16 patterns (uint16), to nearest, ties to even; torch does the rounding."""
    values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16)


def repair() -> None:
    """Teach the interpreter bfloat16, and run-time ranges under NumPy 2.4."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, fma, patch_tensor = (
        builder.cast_impl,
        builder.create_dot,
        builder.create_fma,
        interpreter._patch_lang_tensor,
    )

    def is_bf16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def wide(value: Any) -> Any:
        return handle(widen(value.data), tl.float32) if is_bf16(value) else value

    def in_float32(method: Any) -> Any:
        """An operation on tensors and one NumPy function, with bfloat16 computed in float32."""

        def run(self: Any, *arguments: Any) -> Any:
            *values, function = arguments
            if function is np.where or not any(is_bf16(value) for value in values):
                return method(self, *values, function)
            result = method(self, *map(wide, values), function)
            if result.data.dtype == np.bool_:  # a comparison
                return result
            return handle(narrow(result.data), tl.bfloat16)

        return run

    builder.binary_op = in_float32(builder.binary_op)
    builder.unary_op = in_float32(builder.unary_op)
    builder.ternary_op = in_float32(builder.ternary_op)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        source = wide(source)
        if target.scalar == tl.bfloat16:
            return handle(narrow(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return cast_impl(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        result = fma(self, wide(x), wide(y), wide(z))
        return handle(narrow(result.data), tl.bfloat16) if is_bf16(z) else result

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    builder.create_fma = create_fma

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_lang_tensor

    builtins: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        # Runs at every call of a kernel and of each function in it; listing the members anew was
        # a third of the time.
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [(n, member) for n, member in members if tl.core.is_builtin(member)]
        for name, member in builtins[package]:
            if getattr(package, name) is member:
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin

    call, load = interpreter.GridExecutor.__call__, builder.create_masked_load
    store = builder.create_masked_store
    memory: list[tuple[int, int]] = []  # of the tensors that the running kernel was given

    def guard(pointers: Any, mask: Any, verb: str) -> None:
        """A GPU would use another tensor's memory in silence; here it would end the process."""
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        inside = np.zeros(places.shape, dtype=bool)
        for first, end in memory:
            inside |= (places >= first) & (places < end)
        assert inside.all(), f"the kernel {verb} {int((~inside).sum())} places outside every tensor"

    def guarded_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        guard(pointers, mask, "reads")
        if other is None:  # nobody promises what stands where the mask is False
            element = pointers.get_element_ty()
            kind = interpreter._get_np_dtype(element)
            ones = np.full((*pointers.data.shape, kind.itemsize), 0xFF, np.uint8)
            other = handle(ones.view(kind)[..., 0], element)  # NaN, or -1
        return load(self, pointers, mask, other, *rest)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard(pointers, mask, "writes")
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store

    def quiet_call(self: Any, *arguments: Any, **options: Any) -> None:
        given = (*arguments, *options.values())
        storages = [x.untyped_storage() for x in given if isinstance(x, torch.Tensor)]
        memory[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        # exp(1000) is inf on a GPU too, which says nothing about it.
        with np.errstate(all="ignore"):
            call(self, *arguments, **options)

    interpreter.GridExecutor.__call__ = quiet_call


if DEVICE.type == "cpu":
    repair()
