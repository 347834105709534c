"""Gaussian error linear unit in its exact form, alone or after the addition of a bias.

    z = x + bias                                 bias_gelu only; stays in float32
    y = z * F(z),   F(z) = (1 + erf(z / sqrt(2))) / 2

Backward, with f(z) = exp(-z^2 / 2) / sqrt(2 pi):

    dx    = dy * (F(z) + z * f(z))
    dbias = sum over rows of dx

Rounding: float32 inside, rounded once at the store. (The plain bias_gelu rounds x + bias too.)

Roofline: bytes. Of an element of b bytes, forward reads b and writes b, backward reads 2 b and
writes b, with another b read where the bias wants its gradient. bias_gelu saves the 2 b that
adding the bias apart would move; the bias itself stays in the cache.

Layout: a program takes BLOCK columns of one row.

Limits: unit stride along a row (other layouts are copied first); differentiable once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _launch


@triton.jit
def gelu_fwd_kernel(
    x_ptr,  # (R, D) rows
    bias_ptr,  # (D,) or None
    y_ptr,  # (R, D) contiguous
    x_stride,
    width,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    z = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_bwd_kernel(
    dy_ptr,  # (R, D) rows
    x_ptr,  # (R, D) rows
    bias_ptr,  # (D,) or None
    dx_ptr,  # (R, D) contiguous
    dy_stride,
    x_stride,
    width,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    cumulative = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    dx = dy * (cumulative + z * density)
    tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)


class GeluFunction(torch.autograd.Function):
    """(x, bias or None) -> y."""

    @staticmethod
    def forward(ctx, x, bias):
        bias = None if bias is None else bias.contiguous()
        ctx.save_for_backward(x, bias)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch.launch_columns("gelu", gelu_fwd_kernel, (x,), (bias, y), HAS_BIAS=bias is not None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch.launch_columns(
            "gelu", gelu_bwd_kernel, (dy, x), (bias, dx), HAS_BIAS=bias is not None
        )
        if not ctx.needs_input_grad[1]:
            return dx, None
        return dx, _launch.rows(dx).sum(0, dtype=torch.float32).to(bias.dtype)


def gelu(x: Tensor) -> Tensor:
    """Gaussian error linear unit in its exact form, y = x * (1 + erf(x / sqrt(2))) / 2.

    x (...) float32, float16 or bfloat16; returns the same shape and dtype. ValueError for other
    dtypes or devices. Hendrycks and Gimpel, arXiv 1606.08415.
    """
    _launch.check_floats("gelu", x=x)
    return GeluFunction.apply(x, None)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias and apply the exact gelu, y = gelu(x + bias), in one pass.

    x       (..., D)  float32, float16 or bfloat16
    bias    (D,)      x's dtype
    returns (..., D)  x's dtype; the sum is not rounded on the way
    raises  ValueError for other dtypes, shapes or devices
    """
    _launch.check_floats("bias_gelu", x=x, bias=bias)
    _launch.check_shape("bias_gelu", "bias", bias, x.shape[-1:], "the last axis of x")
    return GeluFunction.apply(x, bias)
