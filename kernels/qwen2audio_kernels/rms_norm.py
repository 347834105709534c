"""RMSNorm over the last axis, alone or after the addition to the residual stream.

    s = x + residual                      add_rms_norm only; rounded to x's dtype
    r = 1 / sqrt(mean(s^2) + eps)         float32
    y = weight * round(s * r)             rounded to x's dtype before the weight and after it

Backward, with g = dy * weight and n = round(s * r):

    ds      = r * (g - s * r^2 * mean(g * s))      plus the gradient that reaches s itself
    dweight = sum over rows of dy * n

Roofline: bytes. Of a row of D elements of b bytes, forward reads b D and writes b D (add_rms_norm:
2 b D and 2 b D), backward reads 2 b D and writes b D (3 and 1); the weight stays in the cache. The
plain version reads and writes about four times as much in float32, in half a dozen launches.

Layout: one program holds a whole row in registers, forward. Backward, a program walks many rows and
keeps their sum of dy * n in float32; the programs' partial sums are added at the end, in a fixed
order, so the result does not change from run to run.

Limits: up to 8,192 elements a row; unit stride along a row (other layouts are copied first);
differentiable once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _launch


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr,  # (R, D) rows
    residual_ptr,  # (R, D) rows, or None
    weight_ptr,  # (D,)
    sum_ptr,  # (R, D) contiguous, or None: x + residual
    y_ptr,  # (R, D) contiguous
    scale_ptr,  # (R,) float32: r
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _launch.begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        rounded = (x + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * width + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(scale_ptr + row, scale)
    normed = (x * scale).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + columns, (weight * normed).to(dtype), mask=inside)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr,  # (R, D) rows
    dsum_ptr,  # (R, D) rows, or None: the gradient that reaches x + residual from elsewhere
    x_ptr,  # (R, D) rows: x, or x + residual
    weight_ptr,  # (D,)
    scale_ptr,  # (R,) float32
    dx_ptr,  # (R, D) contiguous
    dweight_ptr,  # (programs, D) float32: partial sums
    dy_stride,
    dsum_stride,
    x_stride,
    rows,
    width,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # and so the row of the loop
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + row)
        normed = x.to(tl.float32) * scale
        dnormed = dy * weight
        dx = scale * (dnormed - normed * (tl.sum(dnormed * normed, axis=0) / width))
        if HAS_RESIDUAL:
            dsum = tl.load(dsum_ptr + row * dsum_stride + columns, mask=inside, other=0.0)
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normed.to(x.dtype).to(tl.float32)
    tl.store(dweight_ptr + program * width + columns, dweight, mask=inside)


class RMSNormFunction(torch.autograd.Function):
    """(x, residual or None, weight, eps) -> y, or (y, x + residual)."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        weight = weight.contiguous()
        y, summed, statistics, ctx.launch = _launch.launch_norm(
            "rms_norm", rms_norm_fwd_kernel, x, residual, (weight,), eps, statistics=1
        )
        ctx.save_for_backward(x if summed is None else summed, weight, *statistics)
        return y if summed is None else (y, summed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        x, weight, *statistics = ctx.saved_tensors
        dx, (dweight,) = _launch.launch_norm_backward(
            rms_norm_bwd_kernel, dy, dsum, x, weight, statistics, 1, ctx.launch
        )
        return dx, None if dsum is None else dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector to unit root-mean-square, then by a learned weight.

    y = weight * x / sqrt(mean(x^2) + eps)          mean over the last axis

    x        (..., D)  float32, float16 or bfloat16; statistics are taken in float32
    weight   (D,)      x's dtype
    returns  (..., D)  x's dtype; rounded once before the weight, as the published model does
    raises   ValueError for other dtypes, shapes or devices, and for D > 8192
    Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    _launch.check_floats("rms_norm", x=x, weight=weight)
    _launch.check_shape("rms_norm", "weight", weight, x.shape[-1:], "the last axis of x")
    return RMSNormFunction.apply(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum, in one pass.

    summed = x + residual;   y = rms_norm(summed, weight, eps)

    x, residual (..., D)  float32, float16 or bfloat16
    weight      (D,)      x's dtype
    returns     y, summed (..., D); the sum is rounded to x's dtype before it is normalised
    raises      ValueError as rms_norm
    """
    _launch.check_floats("add_rms_norm", x=x, residual=residual, weight=weight)
    _launch.check_shape("add_rms_norm", "residual", residual, x.shape, "the shape of x")
    _launch.check_shape("add_rms_norm", "weight", weight, x.shape[-1:], "the last axis of x")
    return RMSNormFunction.apply(x, residual, weight, eps)
