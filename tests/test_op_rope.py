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


# --- into a cache ---------------------------------------------------------------------------------


def tokens(N: int, H: int, G: int, C: int) -> dict[str, Tensor]:
    """Of a fused projection, with tables of their positions."""
    qkv = draw(N, (H + 2 * G) * C).view(N, H + 2 * G, C)
    q, k, v = qkv.split((H, G, G), dim=1)
    cos, sin = tables(torch.arange(N)[None] * 37, C).values()
    return {"q": q, "k": k, "v": v, "cos": cos[0], "sin": sin[0]}


def place(N: int) -> dict[str, Tensor]:
    """Of N tokens in a cache of 3 rows, not in order."""
    places = torch.randperm(3 * 7, generator=torch.Generator().manual_seed(2))[:N]
    return {"rows": (places // 7).to(DEVICE), "positions": (places % 7).to(DEVICE)}


def cache(G: int, C: int, dtype: torch.dtype, layers: int = 2) -> Tensor:
    """Of several layers, full of what must stay: the op is given one layer."""
    filled = torch.arange(layers * 3 * 7 * G * C, device=DEVICE).view(layers, 3, 7, G, C)
    return (filled % 101).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "H", "G", "C"), [(1, 32, 32, 128), (5, 28, 4, 128), (9, 3, 1, 2), (4, 5, 17, 126)]
)
def test_into_a_cache(N: int, H: int, G: int, C: int, dtype: torch.dtype) -> None:
    def run(op):
        def call(**inputs):
            k_cache, v_cache = (cache(G, C, inputs["q"].dtype) for _ in "kv")
            turned = op(**inputs, k_cache=k_cache[1], v_cache=v_cache[1])
            return *turned, k_cache, v_cache

        return call

    inputs = tokens(N, H, G, C)
    three_way(
        run(kernels.rope_into_cache),
        run(ops.rope_into_cache),
        dtype,
        {**inputs, **place(N)},
        gradients=(),
    )
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    q, k, k_cache, v_cache = run(kernels.rope_into_cache)(**inputs, **place(N))
    turned = kernels.rope(
        inputs["q"][None], inputs["k"][None], inputs["cos"][None], inputs["sin"][None]
    )
    assert torch.equal(q, turned[0][0])  # the same bits as without a cache
    assert torch.equal(k, turned[1][0])
    at = (1, *place(N).values())
    assert torch.equal(k_cache[at], k)
    assert torch.equal(v_cache[at], inputs["v"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_an_int8_cache(dtype: torch.dtype) -> None:
    """Codes and scales bit for bit those of the rounded key, everything else left alone."""
    N, H, G, C = 6, 4, 20, 62
    inputs = {name: x.to(dtype) for name, x in tokens(N, H, G, C).items()}
    inputs["v"][2, 3] = 0  # a scale of zero
    # All codes end in a half: 127 quarters are the largest, so that a code is four times a value.
    inputs["v"][3, 0] = (torch.arange(C, device=DEVICE) - 31).to(dtype) / 4 + 0.125
    inputs["v"][3, 0, 0] = 127 / 4
    before = [cache(G, C, torch.int8) for _ in "kv"]
    scales = [cache(G, 1, torch.float32)[..., 0] for _ in "kv"]
    caches, scaled = [x.clone() for x in before], [x.clone() for x in scales]
    _, k = kernels.rope_into_cache(
        **inputs,
        k_cache=caches[0][1],
        v_cache=caches[1][1],
        **place(N),
        k_scale=scaled[0][1],
        v_scale=scaled[1][1],
    )
    at = (1, *place(N).values())
    for x, found, scale, old, old_scale in zip(
        (k, inputs["v"]), caches, scaled, before, scales, strict=True
    ):
        old[at], old_scale[at] = ops.quantise(x)
        assert torch.equal(found, old)
        assert torch.equal(scale, old_scale)
    assert len(caches[1][at][3, 0].unique()) < C  # halves went to both sides, to the even one


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_int8(bad: float) -> None:
    inputs = tokens(3, 2, 2, 8)
    inputs["v"][1, 0, 5] = bad
    inputs["k"][2, 1, 3] = bad
    codes = [torch.zeros(3, 7, 2, 8, dtype=torch.int8, device=DEVICE) for _ in "kv"]
    scales = [torch.zeros(3, 7, 2, device=DEVICE) for _ in "kv"]
    at = place(3)
    kernels.rope_into_cache(
        **inputs, k_cache=codes[0], v_cache=codes[1], **at, k_scale=scales[0], v_scale=scales[1]
    )
    for scale, token, head in ((scales[0], 2, 1), (scales[1], 1, 0)):
        found = scale[at["rows"], at["positions"]]
        assert not found[token, head].isfinite()
        assert found.isfinite().sum() == 5


def test_no_tokens_for_a_cache() -> None:
    inputs, filled = tokens(0, 4, 2, 8), cache(2, 8, torch.float32)[0]
    before = filled.clone()
    q, k = kernels.rope_into_cache(**inputs, k_cache=filled, v_cache=filled.clone(), **place(0))
    assert (q.shape, k.shape) == ((0, 4, 8), (0, 2, 8))
    assert torch.equal(filled, before)


def test_errors_into_a_cache() -> None:
    right = {
        **tokens(5, 4, 2, 8),
        **place(5),
        **{name: cache(2, 8, torch.float32)[0] for name in ("k_cache", "v_cache")},
    }
    scale = torch.zeros(3, 7, 2, device=DEVICE)
    codes = right["k_cache"].to(torch.int8)
    strided = right["k_cache"].transpose(-1, -2).contiguous().transpose(-1, -2)
    for wrong, message in (
        ({"q": right["q"][0]}, r"q has shape \(4, 8\), expected \(tokens, heads"),
        ({"k": right["k"][:3]}, r"k has shape \(3, 2, 8\), expected \(5, heads, 8\) as q"),
        ({"v": right["v"][:, :1]}, r"v has shape \(5, 1, 8\), expected \(5, 2, 8\)"),
        ({"cos": right["cos"][:, :3]}, r"cos has shape \(5, 3\), expected \(5, 4\)"),
        ({"sin": right["sin"].half()}, r"sin is float16 but q is float32"),
        ({"k_cache": right["k_cache"][0]}, r"k_cache has shape \(7, 2, 8\), expected \(rows"),
        ({"v_cache": right["v_cache"][:2]}, r"v_cache has shape \(2, 7, 2, 8\), expected \(3"),
        ({"k_cache": right["k_cache"].half()}, r"k_cache is torch.float16, expected torch.float32"),
        ({"k_cache": codes, "v_cache": codes}, r"k_cache is torch.int8, expected torch.float32 or"),
        ({"k_cache": strided}, r"k_cache has no unit stride along its channels"),
        ({"k_scale": scale, "v_scale": scale}, r"k_cache is torch.float32, expected .* torch.int8"),
        ({"k_cache": codes, "v_cache": codes, "k_scale": scale}, r"an int8 cache needs v_scale"),
        (
            {"k_cache": codes, "v_cache": codes, "k_scale": scale[0], "v_scale": scale},
            r"k_scale has shape \(7, 2\), expected \(3, 7, 2\)",
        ),
        (
            {"k_cache": codes, "v_cache": codes, "k_scale": scale.half(), "v_scale": scale},
            r"k_scale is torch.float16, expected torch.float32",
        ),
        ({"rows": right["rows"][:4]}, r"rows has shape \(4,\), expected \(5,\)"),
        ({"positions": right["rows"].float()}, r"positions is float32, expected int32 or int64"),
        ({"q": right["q"].clone().requires_grad_()}, r"has no backward"),
    ):
        with pytest.raises(ValueError, match=f"^rope_into_cache: .*{message}"):
            kernels.rope_into_cache(**{**right, **wrong})
