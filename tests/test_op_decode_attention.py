"""Split-KV attention of one query a row against the plain op, by the three-way rule."""

import pytest
import torch
from interpreter import DEVICE
from tolerance import DTYPES, poison, three_way
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_core import ops
from qwen2audio_kernels import _launch


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def plain(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_start: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    if k_scale is not None:
        k_cache = (k_cache * k_scale[..., None]).to(q.dtype)
        v_cache = (v_cache * v_scale[..., None]).to(q.dtype)
    return ops.attention(q[:, None], k_cache, v_cache, False, key_start, lengths)[:, 0]


def inputs(B: int, S: int, H: int, G: int, C: int, int8: bool = False) -> dict[str, Tensor]:
    found = {"q": draw(B, H, C)}
    for seed, name in enumerate(("k", "v"), start=1):
        x = draw(B, S, G, C, seed=seed)
        if int8:
            scale = x.abs().amax(-1) / 127
            found[f"{name}_scale"] = scale
            x = (x / scale[..., None]).round().to(torch.int8)
        found[f"{name}_cache"] = x
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("S", "H", "G", "C", "lengths", "start"),
    [
        (1, 1, 1, 32, (1, 1), None),
        (300, 2, 2, 128, (127, 300), None),
        (513, 4, 2, 64, (128, 129), (0, 63)),
        (300, 2, 1, 80, (63, 299), (62, 1)),
        (200, 1, 1, 64, (0, 190), (0, 190)),  # no key at all
        (2300, 1, 1, 32, (2300, 2049), (0, 2)),  # more parts than are joined at once
    ],
)
def test_decode_attention(
    S: int,
    H: int,
    G: int,
    C: int,
    lengths: tuple[int, ...],
    start: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> None:
    ranges = (integers(*lengths), None if start is None else integers(*start))
    three_way(
        lambda **tensors: kernels.decode_attention(
            **tensors, lengths=ranges[0], key_start=ranges[1]
        ),
        lambda **tensors: plain(**tensors, lengths=ranges[0], key_start=ranges[1]),
        dtype,
        inputs(2, S, H, G, C),
        gradients=(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_cache(dtype: torch.dtype) -> None:
    tensors = inputs(2, 150, 4, 2, 64, int8=True)
    scales = {name: tensors.pop(name) for name in ("k_scale", "v_scale")}  # float32, not rounded
    lengths = integers(150, 127).int()
    three_way(
        lambda **tensors: kernels.decode_attention(**tensors, **scales, lengths=lengths),
        lambda **tensors: plain(**tensors, **scales, lengths=lengths),
        dtype,
        tensors,
        gradients=(),
    )


def test_scores_that_rise_along_the_keys() -> None:
    """Every part and every block in it has a new maximum: what was summed is scaled down."""
    tensors = inputs(1, 2300, 1, 1, 32)
    tensors["q"] = torch.ones_like(tensors["q"])
    tensors["k_cache"][..., 0] = torch.linspace(-50, 50, 2300, device=DEVICE)[:, None]
    three_way(
        lambda **tensors: kernels.decode_attention(**tensors, lengths=integers(2300)),
        lambda **tensors: plain(**tensors, lengths=integers(2300)),
        torch.float32,
        tensors,
        gradients=(),
    )


def test_ranges_beyond_the_cache() -> None:
    tensors = inputs(2, 90, 2, 1, 32)
    ranges = {"lengths": integers(200, 90), "key_start": integers(-5, 3)}
    found, expected = (f(**tensors, **ranges) for f in (kernels.decode_attention, plain))
    torch.testing.assert_close(found, expected)


def test_each_cache_has_strides_of_its_own() -> None:
    tensors = inputs(2, 90, 4, 2, 32)
    v = torch.cat((tensors["v_cache"], tensors["v_cache"]), -1)[..., :32]
    found = kernels.decode_attention(tensors["q"], tensors["k_cache"], v, integers(90, 55))
    torch.testing.assert_close(found, plain(**tensors, lengths=integers(90, 55)))


def test_strided_views() -> None:
    def views(q: Tensor, fused: Tensor) -> tuple[Tensor, ...]:
        cache = fused.transpose(1, 2)  # the cache with its heads first
        return q[:, 1::2], cache[..., :48], cache[..., 48:]

    lengths = integers(40, 33)
    three_way(
        lambda q, fused: kernels.decode_attention(*views(q, fused), lengths),
        lambda q, fused: plain(*views(q, fused), lengths),
        torch.float32,
        {"q": draw(2, 4, 48), "fused": draw(2, 2, 40, 96)},
        gradients=(),
    )


def test_int8_scales_as_a_part_of_a_longer_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(3, 200, 4, 2, 64, int8=True)
    q, lengths = tensors.pop("q"), integers(150, 127)
    part = {name: x[1:, :150] for name, x in tensors.items()}
    whole = {name: x.contiguous() for name, x in part.items()}
    apart = {name: x[:, :, [0, 1]].transpose(1, 2).contiguous() for name, x in part.items()}
    apart = {name: x.transpose(1, 2) for name, x in apart.items()}  # heads first in memory
    expected = kernels.decode_attention(q[1:], **whole, lengths=lengths)
    mixed = [part | {name: whole[name]} for name in ("k_scale", "v_scale")]
    for given in (part, apart, *mixed):
        assert torch.equal(kernels.decode_attention(q[1:], **given, lengths=lengths), expected)
    # A part of a longer cache is read where it lies.
    taken: list[int] = []
    launch = _launch.launch

    def watched(kernel: object, grid: object, *arguments: object, **options: object) -> None:
        taken.extend(x.data_ptr() for x in arguments if isinstance(x, Tensor))
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(_launch, "launch", watched)
    kernels.decode_attention(q[1:], **part, lengths=lengths)
    assert {x.data_ptr() for x in part.values()} <= set(taken)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch_padding_or_cache(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(3, 700, 2, 1, 64).values())
    lengths, start = integers(700, 437, 1), integers(0, 37, 0)
    for x in (k, v):  # nothing out of range is read
        x[1, :37], x[1, 437:] = float("nan"), float("nan")
    together = kernels.decode_attention(q, k, v, lengths, start)
    alone = kernels.decode_attention(q[1:2], k[1:2, 37:437], v[1:2, 37:437], integers(400))
    assert torch.equal(together[1:2], alone)
    assert alone.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: kernels.decode_attention(q, k, v, integers(299)),
        lambda q, k, v: kernels.decode_attention(q, k, v, integers(300), integers(1)),
        lambda q, k, v: kernels.decode_attention(q, k.flip(2), v, integers(300)),
        lambda q, k, v: kernels.decode_attention(q * 1.001, k, v, integers(300)),
    ],
    ids=["last key lost", "first key lost", "heads swapped", "scale"],
)
def test_the_rule_notices(wrong) -> None:
    q, k, v = inputs(1, 300, 2, 2, 32).values()
    with pytest.raises(AssertionError):
        three_way(
            wrong,
            lambda q, k, v: plain(q, k, v, integers(300)),
            torch.float32,
            {"q": q, "k": k, "v": v},
            (),
        )


def test_parts_that_were_never_written_are_never_read() -> None:
    q, k, v = inputs(1, 1000, 1, 1, 32).values()
    with poison():
        y = kernels.decode_attention(q, k, v, integers(130))
    torch.testing.assert_close(y, plain(q, k, v, integers(130)))


def test_errors() -> None:
    q, k, v = inputs(2, 8, 4, 2, 32).values()
    n = integers(8, 8)
    calls = {
        "q has shape": lambda: kernels.decode_attention(q[:, None], k, v, n),
        "k_cache has shape": lambda: kernels.decode_attention(q, k[:1], v, n),
        "v_cache has shape": lambda: kernels.decode_attention(q, k, v[:, :4], n),
        "3 query heads": lambda: kernels.decode_attention(q[:, :3], k, v, n),
        "lengths has shape": lambda: kernels.decode_attention(q, k, v, n[:1]),
        "lengths is float32": lambda: kernels.decode_attention(q, k, v, n.float()),
        "an int8 cache needs k_scale": lambda: kernels.decode_attention(
            q, k.to(torch.int8), v.to(torch.int8), n
        ),
        "k_scale goes with": lambda: kernels.decode_attention(q, k, v, n, None, draw(2, 8, 2)),
        "k_cache is float16": lambda: kernels.decode_attention(q, k.half(), v.half(), n),
        "no backward": lambda: kernels.decode_attention(q.clone().requires_grad_(), k, v, n),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
