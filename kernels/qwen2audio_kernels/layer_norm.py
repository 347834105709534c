"""LayerNorm over the last axis, alone or after the addition to the residual stream.

    s = x + residual                           add_layer_norm only; rounded to x's dtype
    n = (s - mean(s)) * r,   r = 1 / sqrt(var(s) + eps)        float32, biased variance, two passes
    y = weight * n + bias                      rounded once, as PyTorch's own kernel does

Backward, with g = dy * weight:

    ds      = r * (g - mean(g) - n * mean(g * n))    plus the gradient that reaches s itself
    dweight = sum over rows of dy * n
    dbias   = sum over rows of dy

Roofline: bytes. Of a row of D elements of b bytes, forward reads b D and writes b D
(add_layer_norm: 2 b D and 2 b D), backward reads 2 b D and writes b D (3 and 1); weight and bias
stay in the cache.

Layout: one program holds a whole row in registers, forward. Backward, a program walks many rows and
keeps their sums of dy * n and dy in float32; the programs' partial sums are added at the end, in a
fixed order, so the result does not change from run to run.

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
def layer_norm_fwd_kernel(
    x_ptr,  # (R, D) rows
    residual_ptr,  # (R, D) rows, or None
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    sum_ptr,  # (R, D) contiguous, or None: x + residual
    y_ptr,  # (R, D) contiguous
    mean_ptr,  # (R,) float32
    scale_ptr,  # (R,) float32: r
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    # Rounded to nearest: `/` may be off by a unit in the last place. Of a constant row something is
    # left then even where its sum is exact, and the lack of spread makes it large.
    mean = tl.div_rn(tl.sum(x, axis=0), tl.full((), width, tl.float32))
    # Not mean(x^2) - mean(x)^2: that cancels where the mean is large beside the spread.
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = weight * (centred * scale) + bias
    tl.store(y_ptr + row * width + columns, y.to(dtype), mask=inside)


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr,  # (R, D) rows
    dsum_ptr,  # (R, D) rows, or None: the gradient that reaches x + residual from elsewhere
    x_ptr,  # (R, D) rows: x, or x + residual
    weight_ptr,  # (D,)
    mean_ptr,  # (R,) float32
    scale_ptr,  # (R,) float32
    dx_ptr,  # (R, D) contiguous
    dweight_ptr,  # (programs, D) float32: partial sums
    dbias_ptr,  # (programs, D) float32: partial sums
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
    dbias = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normed = tl.where(inside, (x - tl.load(mean_ptr + row)) * scale, 0.0)
        dnormed = dy * weight
        along_one = tl.sum(dnormed, axis=0) / width
        along_normed = tl.sum(dnormed * normed, axis=0) / width
        dx = scale * (dnormed - along_one - normed * along_normed)
        if HAS_RESIDUAL:
            dsum = tl.load(dsum_ptr + row * dsum_stride + columns, mask=inside, other=0.0)
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normed
        dbias += dy
    tl.store(dweight_ptr + program * width + columns, dweight, mask=inside)
    tl.store(dbias_ptr + program * width + columns, dbias, mask=inside)


class LayerNormFunction(torch.autograd.Function):
    """(x, residual or None, weight, bias, eps) -> y, or (y, x + residual)."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        weight, bias = weight.contiguous(), bias.contiguous()
        y, summed, statistics, ctx.launch = _launch.launch_norm(
            "layer_norm", layer_norm_fwd_kernel, x, residual, (weight, bias), eps, statistics=2
        )
        ctx.save_for_backward(x if summed is None else summed, weight, *statistics)
        return y if summed is None else (y, summed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        x, weight, *statistics = ctx.saved_tensors
        dx, (dweight, dbias) = _launch.launch_norm_backward(
            layer_norm_bwd_kernel, dy, dsum, x, weight, statistics, 2, ctx.launch
        )
        return dx, None if dsum is None else dx, dweight, dbias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Shift each vector to mean zero and unit variance, then scale and shift by learned vectors.

    y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias      biased variance, last axis

    x        (..., D)  float32, float16 or bfloat16; float32 inside, rounded once
    weight, bias (D,)  x's dtype
    returns  (..., D)  x's dtype
    raises   ValueError for other dtypes, shapes or devices, and for D > 8192
    Ba et al., arXiv 1607.06450, equation 4.
    """
    _launch.check_floats("layer_norm", x=x, weight=weight, bias=bias)
    _launch.check_shape("layer_norm", "weight", weight, x.shape[-1:], "the last axis of x")
    _launch.check_shape("layer_norm", "bias", bias, x.shape[-1:], "the last axis of x")
    return LayerNormFunction.apply(x, None, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum, in one pass.

    summed = x + residual;   y = layer_norm(summed, weight, bias, eps)

    x, residual  (..., D)  float32, float16 or bfloat16
    weight, bias (D,)      x's dtype
    returns      y, summed (..., D); the sum is rounded to x's dtype before it is normalised
    raises       ValueError as layer_norm
    """
    _launch.check_floats("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    _launch.check_shape("add_layer_norm", "residual", residual, x.shape, "the shape of x")
    _launch.check_shape("add_layer_norm", "weight", weight, x.shape[-1:], "the last axis of x")
    _launch.check_shape("add_layer_norm", "bias", bias, x.shape[-1:], "the last axis of x")
    return LayerNormFunction.apply(x, residual, weight, bias, eps)
