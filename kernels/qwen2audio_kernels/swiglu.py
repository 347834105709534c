"""Gated activation of the decoder's MLP.

    y = round(silu(gate)) * up,   silu(z) = z * s,   s = 1 / (1 + exp(-z))

Backward:

    dup   = dy * silu(gate)
    dgate = dy * up * s * (1 + gate * (1 - s))

Rounding: silu(gate) is rounded to the dtype before the product, as the published model does; all
else is float32, rounded once at the store.

Roofline: bytes. Of an element of b bytes, forward reads 2 b and writes b, backward reads 3 b and
writes 2 b; the plain version moves 5 b forward. There is no gain beyond that ratio short of an
epilogue in the matrix product that makes gate and up.

Layout: a program takes BLOCK columns of one row. gate and up may be the two halves of one fused
(..., 2 D) tensor: their row strides are passed.

Limits: unit stride along a row (other layouts are copied first); differentiable once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _launch


@triton.jit
def swiglu_fwd_kernel(
    gate_ptr,  # (R, D) rows
    up_ptr,  # (R, D) rows
    y_ptr,  # (R, D) contiguous
    gate_stride,
    up_stride,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    dtype = y_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(y_ptr + row * width + columns, (silu * up).to(dtype), mask=inside)


@triton.jit
def swiglu_bwd_kernel(
    dy_ptr,  # (R, D) rows
    gate_ptr,  # (R, D) rows
    up_ptr,  # (R, D) rows
    dgate_ptr,  # (R, D) contiguous
    dup_ptr,  # (R, D) contiguous
    dy_stride,
    gate_stride,
    up_stride,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    dtype = dgate_ptr.dtype.element_ty
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dup = dy * gate * sigmoid
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_ptr + row * width + columns, dgate.to(dtype), mask=inside)
    tl.store(dup_ptr + row * width + columns, dup.to(dtype), mask=inside)


class SwigluFunction(torch.autograd.Function):
    """(gate, up) -> y."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch.launch_columns("swiglu", swiglu_fwd_kernel, (gate, up), (y,))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty_like(dgate)
        _launch.launch_columns("swiglu", swiglu_bwd_kernel, (dy, gate, up), (dgate, dup))
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated activation of the MLP, y = gate / (1 + exp(-gate)) * up.

    gate, up (..., D) of one dtype, float32, float16 or bfloat16; returns (..., D), with silu(gate)
    rounded to that dtype before the product, as the published model does. ValueError for other
    dtypes, shapes or devices. Shazeer, arXiv 2002.05202, equation 6.
    """
    _launch.check_floats("swiglu", gate=gate, up=up)
    _launch.check_shape("swiglu", "up", up, gate.shape, "the shape of gate")
    return SwigluFunction.apply(gate, up)
