"""RMSNorm kernels against the plain op, by the three-way rule."""

import pytest
import torch
from interpreter import DEVICE
from tolerance import DTYPES, three_way
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_core import ops

EPS = 1e-5


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return ops.rms_norm(summed, weight, EPS), summed


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 4096), (3, 1), (1, 63), (7, 127), (2, 3, 1000), (17, 64)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    three_way(
        lambda x, weight: kernels.rms_norm(x, weight, EPS),
        lambda x, weight: ops.rms_norm(x, weight, EPS),
        dtype,
        {"x": draw(*shape) * 3, "weight": 1 + draw(shape[-1], seed=1)},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4096), (9, 127)])
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    three_way(
        lambda x, residual, weight: kernels.add_rms_norm(x, residual, weight, EPS),
        add_rms_norm,
        dtype,
        {
            "x": draw(*shape),
            "residual": 3 * draw(*shape, seed=1),
            "weight": 1 + draw(shape[-1], seed=2),
        },
    )


def test_what_is_added_has_strides_of_its_own() -> None:
    three_way(
        lambda x, wide, weight: kernels.add_rms_norm(x, wide[:, :40], weight, EPS),
        lambda x, wide, weight: add_rms_norm(x, wide[:, :40], weight),
        torch.float32,
        {"x": draw(5, 40), "wide": draw(5, 64, seed=1), "weight": draw(40, seed=2)},
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_rounded_sum_is_normalised_bit_for_bit(dtype: torch.dtype) -> None:
    x, residual = draw(3, 4096).to(dtype), draw(3, 4096, seed=1).to(dtype)
    weight = draw(4096, seed=2).to(dtype)
    y, summed = kernels.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    # Of the unrounded sum a sixth would differ.
    assert (y != ops.rms_norm(summed, weight, EPS)).float().mean() < 1e-3


VIEWS = {
    "last axis cut": lambda x: x[..., 8:17],
    "rows skipped": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(-1, -2),
    "one row, repeated": lambda x: x[:1, :1].expand(3, 4, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strided_views(view) -> None:
    x = draw(2, 6, 20)
    three_way(
        lambda x, weight: kernels.rms_norm(view(x), weight[::2], EPS),
        lambda x, weight: ops.rms_norm(view(x), weight[::2], EPS),
        torch.float32,
        {"x": x, "weight": draw(2 * view(x).shape[-1], seed=1)},
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once_before_the_weight_bit_for_bit(dtype: torch.dtype) -> None:
    # 4096 values a row: were the weight applied before the rounding, a quarter would differ.
    x, weight = draw(3, 4096).to(dtype), draw(4096, seed=1).to(dtype)
    ours, plain = kernels.rms_norm(x, weight, EPS), ops.rms_norm(x, weight, EPS)
    assert (ours != plain).float().mean() < 1e-3  # the two sums of squares may differ by a bit


def test_large_and_tiny_rows() -> None:
    x = draw(3, 256) * torch.tensor([1e-12, 1.0, 1e15], device=DEVICE)[:, None]
    y = kernels.rms_norm(x, torch.ones(256, device=DEVICE), EPS)
    torch.testing.assert_close(y, ops.rms_norm(x, torch.ones(256, device=DEVICE), EPS))


def test_no_rows() -> None:
    x = torch.empty(0, 64, device=DEVICE, requires_grad=True)
    weight = torch.ones(64, device=DEVICE, requires_grad=True)
    kernels.rms_norm(x, weight, EPS).sum().backward()
    assert x.grad.shape == (0, 64)
    assert weight.grad.eq(0).all()


def test_gradient_check_is_not_vacuous() -> None:
    """The rule itself: a gradient off by 0.1 % fails it, in float32."""
    with pytest.raises(AssertionError, match="dweight: largest error"):
        three_way(
            lambda x, weight: kernels.rms_norm(x, weight * 1.001 - weight.detach() * 0.001, EPS),
            lambda x, weight: ops.rms_norm(x, weight, EPS),
            torch.float32,
            {"x": draw(3, 64), "weight": draw(64, seed=1)},
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 4).double(), torch.ones(4).double()), r"x is float64; .* plain op"),
        ((torch.ones(2, 4), torch.ones(4).half()), r"weight is float16 but x is float32"),
        ((torch.ones(2, 4), torch.ones(3)), r"weight has shape \(3,\), expected \(4,\)"),
        ((torch.ones(2, 4), torch.ones(4, device="meta")), r"weight is on meta"),
        ((torch.ones(1, 8193), torch.ones(8193)), r"rows of 8193 elements"),
    ],
)
def test_errors(arguments: tuple[Tensor, Tensor], message: str) -> None:
    x, weight = (a if a.is_meta else a.to(DEVICE) for a in arguments)
    with pytest.raises(ValueError, match=f"^rms_norm: {message}"):
        kernels.rms_norm(x, weight, EPS)


def test_a_cpu_tensor_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2audio_kernels import _launch

    monkeypatch.setattr(_launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^rms_norm: x is on cpu; the kernel needs a GPU"):
        kernels.rms_norm(torch.ones(2, 4), torch.ones(4), EPS)


def test_add_rms_norm_needs_equal_shapes() -> None:
    x = torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"^add_rms_norm: residual has shape \(4,\)"):
        kernels.add_rms_norm(x, x[0], x[0], EPS)
