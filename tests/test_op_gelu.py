"""GELU kernels against the plain op, by the three-way rule."""

import math

import pytest
import torch
from interpreter import DEVICE
from tolerance import DTYPES, three_way
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_core import ops


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 5120), (5, 1), (63,), (2, 3, 127), (2, 1000)])
def test_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    three_way(kernels.gelu, ops.gelu, dtype, {"x": 2 * draw(*shape)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 5120), (63,), (2, 3, 127)])
def test_bias_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    three_way(
        kernels.bias_gelu,
        lambda x, bias: ops.gelu(x + bias),
        dtype,
        {"x": 2 * draw(*shape), "bias": draw(shape[-1], seed=1)},
    )


VIEWS = {
    "last axis cut": lambda x: x[..., 8:],
    "rows skipped": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(-1, -2),
    "element step": lambda x: x[..., ::3],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strided_views(view) -> None:
    x = draw(2, 4, 21)
    three_way(
        lambda x, bias: kernels.bias_gelu(view(x), bias[::2]),
        lambda x, bias: ops.gelu(view(x) + bias[::2]),
        torch.float32,
        {"x": x, "bias": draw(2 * view(x).shape[-1], seed=1)},
    )


def test_exact_form_not_the_tanh_approximation() -> None:
    x = torch.linspace(-6, 6, 101)
    expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()]
    ours = kernels.gelu(x.to(DEVICE)).cpu()
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=0, atol=1e-6)  # tanh: 5e-4 off


def test_a_scalar_and_no_elements() -> None:
    assert kernels.gelu(torch.tensor(0.0, device=DEVICE)).shape == ()
    x = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    bias = torch.ones(8, device=DEVICE, requires_grad=True)
    kernels.bias_gelu(x, bias).sum().backward()
    assert x.grad.shape == (0, 8)
    assert bias.grad.eq(0).all()


def test_a_frozen_bias_gets_no_gradient() -> None:
    x = draw(3, 8).requires_grad_()
    bias = draw(8, seed=1)
    kernels.bias_gelu(x, bias).sum().backward()
    assert bias.grad is None
    assert x.grad.isfinite().all()


def test_errors() -> None:
    x = torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"^gelu: x is int64; .* plain op"):
        kernels.gelu(x.long())
    with pytest.raises(ValueError, match=r"^bias_gelu: bias is float16 but x is float32"):
        kernels.bias_gelu(x, x[0].half())
    with pytest.raises(ValueError, match=r"^bias_gelu: bias has shape \(3,\), expected \(4,\)"):
        kernels.bias_gelu(x, x[0, :3])
