"""LayerNorm kernels against the plain op, by the three-way rule."""

import pytest
import torch
from interpreter import DEVICE
from tolerance import DTYPES, three_way
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_core import ops

EPS = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return ops.layer_norm(summed, weight, bias, EPS), summed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 1280), (1, 63), (7, 127), (2, 3, 1000), (17, 64)])
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    three_way(
        lambda x, weight, bias: kernels.layer_norm(x, weight, bias, EPS),
        lambda x, weight, bias: ops.layer_norm(x, weight, bias, EPS),
        dtype,
        {
            "x": 2 * draw(*shape) + 0.5,
            "weight": 1 + draw(shape[-1], seed=1),
            "bias": draw(shape[-1], seed=2),
        },
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1280), (9, 127)])
def test_add_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    three_way(
        lambda x, residual, weight, bias: kernels.add_layer_norm(x, residual, weight, bias, EPS),
        add_layer_norm,
        dtype,
        {
            "x": draw(*shape),
            "residual": 3 * draw(*shape, seed=1),
            "weight": 1 + draw(shape[-1], seed=2),
            "bias": draw(shape[-1], seed=3),
        },
    )


def test_what_is_added_has_strides_of_its_own() -> None:
    three_way(
        lambda x, wide, **more: kernels.add_layer_norm(x, wide[:, :40], **more, eps=EPS),
        lambda x, wide, **more: add_layer_norm(x, wide[:, :40], **more),
        torch.float32,
        {
            "x": draw(5, 40),
            "wide": draw(5, 64, seed=1),
            "weight": draw(40, seed=2),
            "bias": draw(40, seed=3),
        },
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once_bit_for_bit(dtype: torch.dtype) -> None:
    x, residual = draw(3, 1280).to(dtype), draw(3, 1280, seed=1).to(dtype)
    weight, bias = (draw(1280, seed=seed).to(dtype) for seed in (2, 3))

    def once(x: Tensor) -> Tensor:
        return ops.layer_norm(x.double(), weight.double(), bias.double(), EPS).to(dtype)

    # Rounded before the weight, or made of the unrounded sum, a sixth and more would differ.
    assert (kernels.layer_norm(x, weight, bias, EPS) != once(x)).float().mean() < 5e-3
    y, summed = kernels.add_layer_norm(x, residual, weight, bias, EPS)
    assert torch.equal(summed, x + residual)
    assert (y != once(summed)).float().mean() < 5e-3


def test_mean_far_above_the_spread() -> None:
    """mean(x^2) - mean(x)^2 in float32 would lose every digit of this variance."""
    three_way(
        lambda x, weight, bias: kernels.layer_norm(x, weight, bias, EPS),
        lambda x, weight, bias: ops.layer_norm(x, weight, bias, EPS),
        torch.float32,
        {"x": 3000 + draw(3, 200), "weight": draw(200, seed=1), "bias": draw(200, seed=2)},
        gradients=(),
    )


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_width_one_and_constant_rows_give_the_bias(value: float) -> None:
    for width in (1, 100):
        x = torch.full((3, width), value, device=DEVICE)
        bias = draw(width)
        y = kernels.layer_norm(x, torch.ones(width, device=DEVICE), bias, EPS)
        assert torch.equal(y, bias.expand(3, width))


VIEWS = {
    "last axis cut": lambda x: x[..., 8:17],
    "rows skipped": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(-1, -2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strided_views(view) -> None:
    x = draw(2, 6, 20)
    width = view(x).shape[-1]
    three_way(
        lambda x, weight, bias: kernels.layer_norm(view(x), weight[::2], bias, EPS),
        lambda x, weight, bias: ops.layer_norm(view(x), weight[::2], bias, EPS),
        torch.float32,
        {"x": x, "weight": draw(2 * width, seed=1), "bias": draw(width, seed=2)},
    )


def test_no_rows() -> None:
    x = torch.empty(2, 0, 64, device=DEVICE, requires_grad=True)
    weight = torch.ones(64, device=DEVICE, requires_grad=True)
    bias = torch.ones(64, device=DEVICE, requires_grad=True)
    kernels.layer_norm(x, weight, bias, EPS).sum().backward()
    assert x.grad.shape == (2, 0, 64)
    assert weight.grad.eq(0).all()
    assert bias.grad.eq(0).all()


def test_errors() -> None:
    x, w = torch.ones(2, 4, device=DEVICE), torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"^layer_norm: x is float64; .* plain op"):
        kernels.layer_norm(x.double(), w.double(), w.double(), EPS)
    with pytest.raises(ValueError, match=r"^layer_norm: bias is bfloat16 but x is float32"):
        kernels.layer_norm(x, w, w.bfloat16(), EPS)
    with pytest.raises(ValueError, match=r"^layer_norm: bias has shape \(2,\), expected \(4,\)"):
        kernels.layer_norm(x, w, w[:2], EPS)
    with pytest.raises(ValueError, match=r"^add_layer_norm: residual has shape \(4,\)"):
        kernels.add_layer_norm(x, w, w, w, EPS)
