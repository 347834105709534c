"""SwiGLU kernel against the plain op, by the three-way rule."""

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
@pytest.mark.parametrize("shape", [(1, 2, 11008), (5, 1), (63,), (2, 3, 127), (2, 1000)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    three_way(
        kernels.swiglu, ops.swiglu, dtype, {"gate": 4 * draw(*shape), "up": draw(*shape, seed=1)}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_a_fused_projection(dtype: torch.dtype) -> None:
    three_way(
        lambda both: kernels.swiglu(*both.chunk(2, dim=-1)),
        lambda both: ops.swiglu(*both.chunk(2, dim=-1)),
        dtype,
        {"both": 3 * draw(2, 3, 254)},
    )


def test_gate_and_up_have_strides_of_their_own() -> None:
    three_way(
        lambda gate, wide: kernels.swiglu(gate, wide[:, :50]),
        lambda gate, wide: ops.swiglu(gate, wide[:, :50]),
        torch.float32,
        {"gate": draw(5, 50), "wide": draw(5, 64, seed=1)},
    )


def test_transposed() -> None:
    three_way(
        lambda gate, up: kernels.swiglu(gate.T, up),
        lambda gate, up: ops.swiglu(gate.T, up),
        torch.float32,
        {"gate": draw(60, 4), "up": draw(4, 60, seed=1)},
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_silu_before_the_product_bit_for_bit(dtype: torch.dtype) -> None:
    gate, up = (3 * draw(4, 1000)).to(dtype), draw(4, 1000, seed=1).to(dtype)
    # One rounding instead of two would change a quarter of the values.
    assert (kernels.swiglu(gate, up) != ops.swiglu(gate, up)).float().mean() < 2e-3


def test_far_gates_saturate_without_nan() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, 90.0, 200.0], device=DEVICE, requires_grad=True)
    y = kernels.swiglu(gate, torch.ones_like(gate))
    assert y.tolist() == [0.0, 0.0, y[2].item(), 90.0, 200.0]
    assert abs(y[2].item()) < 1e-36
    (gradient,) = torch.autograd.grad(y.sum(), gate)
    assert gradient[3:].tolist() == [1.0, 1.0]
    assert gradient[:3].abs().max() < 1e-36


def test_no_elements() -> None:
    x = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    kernels.swiglu(x, x).sum().backward()
    assert x.grad.shape == (0, 8)
    assert kernels.swiglu(x.view(8, 0), x.view(8, 0)).shape == (8, 0)


def test_errors() -> None:
    x = torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"^swiglu: gate is float64; .* plain op"):
        kernels.swiglu(x.double(), x.double())
    with pytest.raises(ValueError, match=r"^swiglu: up is float16 but gate is float32"):
        kernels.swiglu(x, x.half())
    with pytest.raises(ValueError, match=r"^swiglu: up has shape \(2, 3\), expected \(2, 4\)"):
        kernels.swiglu(x, x[:, :3])
