"""Rotary embedding kernel against the plain op, by the three-way rule."""

import pytest
import torch
from interpreter import DEVICE
from tolerance import DTYPES, three_way
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_core import ops


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tables(positions: Tensor, channels: int) -> dict[str, Tensor]:
    cos, sin = ops.rope_tables(positions.to(DEVICE), channels, 10000.0, torch.float32)
    return {"cos": cos, "sin": sin}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "T", "H", "G", "C"),
    [(1, 2, 32, 32, 128), (2, 1, 28, 4, 128), (2, 3, 3, 1, 2), (1, 3, 5, 17, 126)],
)
def test_rope(B: int, T: int, H: int, G: int, C: int, dtype: torch.dtype) -> None:
    three_way(
        kernels.rope,
        ops.rope,
        dtype,
        {
            "q": draw(B, T, H, C),
            "k": draw(B, T, G, C, seed=1),
            **tables(torch.arange(B * T).reshape(B, T) * 37, C),
        },
        gradients=("q", "k"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_a_fused_projection_and_one_table_for_all_rows(dtype: torch.dtype) -> None:
    B, T, H, G, C = 2, 3, 4, 2, 64

    def split(qkv: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.view(B, T, H + 2 * G, C).split((H, G, G), dim=2)
        assert not q.is_contiguous()
        return q, k

    three_way(
        lambda qkv, cos, sin: kernels.rope(*split(qkv), cos, sin),
        lambda qkv, cos, sin: ops.rope(*split(qkv), cos, sin),
        dtype,
        {"qkv": draw(B, T, (H + 2 * G) * C), **tables(torch.arange(T)[None], C)},
        gradients=("qkv",),
    )


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(1, 2), lambda x: x.transpose(2, 3)],
    ids=["heads before time", "channels strided"],
)
def test_transposed(view) -> None:
    # The plain layout is (B, T, H, C) = (2, 4, 6, 8) after the view.
    q, k = view(view(draw(2, 4, 6, 8)).contiguous()), view(view(draw(2, 4, 6, 8)).contiguous())
    assert not q.is_contiguous()
    three_way(
        lambda q, k, cos, sin: kernels.rope(view(q), view(k), cos, sin),
        lambda q, k, cos, sin: ops.rope(view(q), view(k), cos, sin),
        torch.float32,
        {
            "q": view(q).contiguous(),
            "k": view(k).contiguous(),
            **tables(torch.arange(8).reshape(2, 4), 8),
        },
        gradients=("q", "k"),
    )


def test_turns_halves_not_neighbours() -> None:
    """Closed form: position 1, one pair at frequency 1, the other at theta^(-1/2) = 0.01."""
    q = torch.tensor([1.0, 0.0, 0.0, 1.0], device=DEVICE).view(1, 1, 1, 4)
    cos, sin = ops.rope_tables(torch.ones(1, 1, dtype=torch.long, device=DEVICE), 4, 1e4, q.dtype)
    turned, _ = kernels.rope(q, q, cos, sin)
    a, b = torch.tensor(1.0), torch.tensor(0.01)
    expected = torch.stack((a.cos(), -b.sin(), a.sin(), b.cos()))
    torch.testing.assert_close(turned.flatten().cpu(), expected)


def test_backward_undoes_forward() -> None:
    q = draw(1, 5, 2, 16).requires_grad_()
    cos, sin = tables(torch.arange(5)[None] * 11, 16).values()
    turned, _ = kernels.rope(q, q.detach(), cos, sin)
    (back,) = torch.autograd.grad(turned, q, turned.detach())
    torch.testing.assert_close(back, q.detach())


def test_no_positions() -> None:
    q = torch.empty(2, 0, 4, 8, device=DEVICE)
    cos = torch.empty(2, 0, 4, device=DEVICE)
    assert [y.shape for y in kernels.rope(q, q[:, :, :1], cos, cos)] == [(2, 0, 4, 8), (2, 0, 1, 8)]


def test_errors() -> None:
    q, cos = torch.ones(2, 3, 4, 8, device=DEVICE), torch.ones(2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"^rope: q is float64; .* plain op"):
        kernels.rope(q.double(), q.double(), cos.double(), cos.double())
    with pytest.raises(ValueError, match=r"^rope: cos is float32 but q is float16"):
        kernels.rope(q.half(), q.half(), cos, cos)
    with pytest.raises(ValueError, match=r"^rope: q has shape \(2, 3, 4, 7\), expected .* even"):
        kernels.rope(q[..., :7], q[..., :7], cos, cos)
    with pytest.raises(ValueError, match=r"^rope: k has shape \(2, 2, 4, 8\), expected \(2, 3,"):
        kernels.rope(q, q[:, :2], cos, cos)
    with pytest.raises(ValueError, match=r"^rope: sin has shape \(2, 3, 3\), expected \(2, 3, 4\)"):
        kernels.rope(q, q, cos, cos[..., :3])
    with pytest.raises(ValueError, match=r"^rope: cos wants a gradient; only the plain op"):
        kernels.rope(q, q, cos.clone().requires_grad_(), cos)


def test_cosines_and_sines_have_strides_of_their_own() -> None:
    found = tables(torch.arange(6).reshape(2, 3) * 5, 16)
    wide = torch.cat((found["sin"], found["sin"]), -1)[..., :8]
    q, k = draw(2, 3, 2, 16), draw(2, 3, 1, 16, seed=1)
    for one, other in zip(
        kernels.rope(q, k, found["cos"], wide), ops.rope(q, k, **found), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once_bit_for_bit(dtype: torch.dtype) -> None:
    q, k = draw(2, 9, 4, 64).to(dtype), draw(2, 9, 2, 64, seed=1).to(dtype)
    found = {n: x.to(dtype) for n, x in tables(torch.arange(18).reshape(2, 9), 64).items()}
    wide = ops.rope(q.double(), k.double(), **{n: x.double() for n, x in found.items()})
    for one, other in zip(kernels.rope(q, k, **found), wide, strict=True):
        # With the two products rounded to the inputs' type a quarter would differ.
        assert (one != other.to(dtype)).float().mean() < 5e-3
