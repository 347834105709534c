"""The small-M linear kernel, plain and quantised, against PyTorch by the three-way rule."""

import math
import mmap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE
from tolerance import DTYPES, three_way
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_kernels import _launch

FORMATS = ("float", "int8", "int4")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def codes(outputs: int, K: int, weights: str) -> tuple[Tensor, Tensor]:
    """Random codes and scales of a quantised weight."""
    generator = torch.Generator().manual_seed(7)
    if weights == "int8":
        drawn = torch.randint(-128, 128, (outputs, K), generator=generator)
        return drawn.to(DEVICE, torch.int8), 0.01 + draw(outputs).abs() / 64
    drawn = torch.randint(0, 256, (outputs, K // 2), generator=generator)
    scale_zero = torch.stack(
        (0.05 + draw(K // 128, outputs).abs() / 8, draw(K // 128, outputs)), -1
    )
    return drawn.to(DEVICE, torch.uint8), scale_zero


def widen(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight that the codes stand for, from the text at the top of the kernel's file."""
    if scale is None:
        return weight
    if weight.dtype == torch.int8:
        return weight.to(scale.dtype) * scale[:, None]
    pairs = weight.unflatten(1, (-1, 64))  # byte j of a group
    code = torch.cat((pairs & 15, pairs >> 4), -1).to(scale.dtype)  # (outputs, K/128, 128)
    step, zero = (t.transpose(0, 1)[..., None] for t in scale.unbind(-1))
    return ((code - 8) * step + zero).flatten(1)


def plain(x, weight, bias=None, scale=None, residual=None, swiglu=False) -> Tensor:
    y = F.linear(x, widen(weight, scale, x.dtype).to(x.dtype), bias)
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def inputs(M: int, N: int, K: int, weights: str, bias: bool, residual: bool, swiglu: bool) -> dict:
    outputs = 2 * N if swiglu else N
    found = {"x": draw(M, K)}
    if weights == "float":
        found["weight"] = draw(outputs, K, seed=1)
    else:
        found["weight"], found["scale"] = codes(outputs, K, weights)
    if bias:
        found["bias"] = draw(outputs, seed=2)
    if residual:
        found["residual"] = 10 * draw(M, N, seed=3)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(
    ("M", "N", "K", "bias", "residual", "swiglu", "deterministic"),
    [
        (1, 127, 256, True, False, False, False),
        (1, 63, 1408, False, True, True, False),  # the last tile is not whole, K is split
        (3, 300, 384, True, True, False, False),
        (1, 65, 640, False, False, False, True),
        (64, 40, 640, True, False, True, False),
        (67, 24, 256, False, False, False, True),
    ],
)
def test_linear(
    M: int,
    N: int,
    K: int,
    bias: bool,
    residual: bool,
    swiglu: bool,
    deterministic: bool,
    weights: str,
    dtype: torch.dtype,
) -> None:
    three_way(
        lambda **tensors: kernels.linear(**tensors, swiglu=swiglu, deterministic=deterministic),
        lambda **tensors: plain(**tensors, swiglu=swiglu),
        dtype,
        inputs(M, N, K, weights, bias, residual, swiglu),
        gradients=(),
    )


@pytest.mark.parametrize("K", [1, 63, 127, 300])
@pytest.mark.parametrize("M", [1, 5])
def test_any_width(M: int, K: int) -> None:
    three_way(
        kernels.linear,
        plain,
        torch.bfloat16,
        inputs(M, 17, K, "float", True, False, False),
        gradients=(),
    )


def test_strided_views_and_leading_axes() -> None:
    three_way(
        lambda x, weight, residual: kernels.linear(
            x[:, 0, ::2], weight[::2, :96], residual=residual[:, :, 3:36]
        ),
        lambda x, weight, residual: plain(
            x[:, 0, ::2], weight[::2, :96], residual=residual[:, :, 3:36]
        ),
        torch.float32,
        {"x": draw(2, 2, 6, 96), "weight": draw(66, 128), "residual": draw(2, 3, 40)},
        gradients=(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", FORMATS)
def test_a_row_does_not_depend_on_its_batch(weights: str, dtype: torch.dtype) -> None:
    tensors = inputs(37, 48, 640, weights, True, True, False)
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    x, residual = tensors.pop("x"), tensors.pop("residual")

    def run(rows: slice) -> Tensor:
        return kernels.linear(x[rows], residual=residual[rows], deterministic=True, **tensors)

    together = run(slice(None))
    for rows in (slice(0, 1), slice(36, 37), slice(5, 21)):
        assert torch.equal(run(rows), together[rows])


def sparse(*shape: int, dtype: torch.dtype, **_: Any) -> Tensor:
    """As torch.empty, of memory that is only there once it is written; as much lies before it, so
    that an offset which wraps around does no harm."""
    size = math.prod(shape)
    no_reserve = 0x4000  # a name in mmap from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    pages = mmap.mmap(-1, 2 * size * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype)[size:].view(shape)


APART = 2**30  # elements from a row to the next: the third begins where int32 ends
sparsely = pytest.mark.skipif(DEVICE.type != "cpu", reason="memory that is not there")


@sparsely
@pytest.mark.parametrize("weights", FORMATS)
def test_inputs_beyond_int32(weights: str) -> None:
    tensors = inputs(3, 16, 256, weights, False, True, False)
    tensors = {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()}
    expected = kernels.linear(**tensors)
    for name in ("x", "residual"):
        wide = sparse(3, APART, dtype=torch.float16)[:, : tensors[name].shape[1]]
        tensors[name] = wide.copy_(tensors[name])
    assert torch.equal(kernels.linear(**tensors), expected)


@sparsely
@pytest.mark.parametrize("K", [256, 2048], ids=["whole", "split"])
def test_outputs_beyond_int32(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^30 outputs, of which the first tile is computed; K in parts makes a third row of those."""
    x, weight = draw(3, K).half(), draw(1, K, seed=1).half()
    monkeypatch.setattr(_launch, "processors", lambda device: APART)
    expected = kernels.linear(x, weight.expand(8, K))
    launch, launched = _launch.launch, []

    def first_tile(kernel: Any, grid: tuple[int, ...], *words: Any, **options: Any) -> None:
        launched.append(kernel.__name__)
        assert grid[0] <= 3, "the rows come first, and the outputs behind them"
        launch(kernel, (grid[0], 1, *grid[2:]), *words, **options)

    monkeypatch.setattr(_launch, "launch", first_tile)
    monkeypatch.setattr(torch, "empty", sparse)
    y = kernels.linear(x, weight.expand(APART, K))
    assert len(launched) == (1 if K == 256 else 2)
    assert torch.equal(y[:, :8], expected)


def test_more_rows_than_a_grid_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    kernels.linear(draw(1, 2048).expand(70_000, -1), draw(16, 2048))
    assert len(grids) == 2 and grids[1][0] == 70_000
    assert all(size < 65_536 for grid in grids for size in grid[1:])  # CUDA's limit


@pytest.mark.gpu
def test_logits_of_many_positions() -> None:
    """2.2 G logits, of which the last rows lie beyond int32; 5 GB."""
    x, weight = draw(14_000, 128).bfloat16(), draw(156_032, 128, seed=1).bfloat16()
    y = kernels.linear(x, weight)
    rows = torch.tensor([0, 13_762, 13_763, 13_999])
    close = torch.isclose(y[rows].float(), F.linear(x[rows], weight).float(), rtol=0.02, atol=0.02)
    assert close.all()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight, scale: kernels.linear(x, weight, scale=scale.flip(-1)),
        lambda x, weight, scale: kernels.linear(x, (weight >> 4) | (weight << 4), scale=scale),
        lambda x, weight, scale: kernels.linear(x, weight, scale=scale.roll(1, 0)),
        lambda x, weight, scale: kernels.linear(x.roll(1, 1), weight, scale=scale),
        lambda x, weight, scale: kernels.linear(x, weight, scale=scale * 1.001),
    ],
    ids=["scale and zero", "high and low", "groups", "inputs", "scale"],
)
@pytest.mark.parametrize("M", [1, 2])
def test_the_rule_notices(M: int, wrong) -> None:
    with pytest.raises(AssertionError):
        three_way(wrong, plain, torch.float32, inputs(M, 16, 256, "int4", False, False, False), ())


def test_errors() -> None:
    x, weight, scale = draw(2, 256), draw(6, 256), draw(6)
    byte = torch.zeros(6, 128, dtype=torch.uint8, device=DEVICE)
    calls = {
        "weight has shape": lambda: kernels.linear(x, weight[:, :100]),
        "weight is float16 but x is float32": lambda: kernels.linear(x, weight.half()),
        "scale goes with": lambda: kernels.linear(x, weight, scale=scale),
        "scale has shape": lambda: kernels.linear(x, byte, scale=scale),
        "groups of 128": lambda: kernels.linear(x[:, :100], byte[:, :50], scale=scale),
        "even number of rows, not 5": lambda: kernels.linear(x, weight[:5], swiglu=True),
        "bias has shape": lambda: kernels.linear(x, weight, bias=scale[:5]),
        "residual has shape": lambda: kernels.linear(x, weight, residual=x),
        "no backward": lambda: kernels.linear(x, weight.clone().requires_grad_()),
    }

    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_row_rounds_once_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight = draw(1, 500).to(dtype), draw(300, 500, seed=1).to(dtype)
    once = F.linear(x.double(), weight.double()).to(dtype)
    # With each product rounded to the inputs' type nearly half would differ.
    assert (kernels.linear(x, weight) != once).float().mean() < 1e-2
