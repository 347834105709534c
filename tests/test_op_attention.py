"""Flash attention, forward and backward, against the plain op by the three-way rule."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from interpreter import DEVICE
from tolerance import DTYPES, poison, three_way
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_core import ops
from qwen2audio_kernels.attention import attention_varlen


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def qkv(B: int, T: int, S: int, H: int, G: int, C: int) -> dict[str, Tensor]:
    return {"q": draw(B, T, H, C), "k": draw(B, S, G, C, seed=1), "v": draw(B, S, G, C, seed=2)}


def integers(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "S", "H", "G", "C", "causal"),
    [
        (63, 63, 1, 1, 64, False),  # the encoder's heads
        (127, 127, 2, 1, 128, True),  # the decoder's, with grouped keys
        (5, 131, 2, 1, 32, True),  # a prefix in the cache
        (1, 129, 1, 1, 64, True),
        (40, 21, 1, 1, 64, True),  # the first queries see no key
        (70, 65, 1, 1, 80, False),  # channels that are no power of two
        (40, 40, 4, 2, 64, True),  # groups of heads, several of them
        (128, 129, 1, 1, 32, True),  # whole blocks of queries, the last key in a block of its own
    ],
)
def test_attention(
    T: int, S: int, H: int, G: int, C: int, causal: bool, dtype: torch.dtype
) -> None:
    three_way(
        partial(kernels.attention, causal=causal),
        partial(ops.attention, causal=causal),
        dtype,
        qkv(1, T, S, H, G, C),
    )


RANGES = {
    "padding on the left": (integers(0, 70), None),
    "padding on the right": (None, integers(97, 64)),
    "both": (integers(3, 30), integers(80, 41)),
    "a row without keys": (integers(0, 97), integers(97, 30)),
    "beyond the tensor": (integers(-4, 5), integers(97, 200)),
}


@pytest.mark.parametrize(
    ("causal", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
@pytest.mark.parametrize(("start", "end"), RANGES.values(), ids=RANGES.keys())
def test_key_ranges(
    start: Tensor | None, end: Tensor | None, causal: bool, dtype: torch.dtype
) -> None:
    ranges = {"causal": causal, "key_start": start, "key_end": end}
    three_way(
        partial(kernels.attention, **ranges),
        partial(ops.attention, **ranges),
        dtype,
        qkv(2, 60, 97, 1, 1, 32),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(dtype: torch.dtype) -> None:
    # Softmax over one key has no gradient: the kernel takes the difference of two sums of the same
    # products, plain autograd of two equal numbers. So the rule cannot serve, and the bound is that
    # of two sums of C products, each off by at most C roundings.
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(1, 3, 5, 1, 1, 64).values())
    y = kernels.attention(q, k, v, False, integers(2), integers(3))
    assert torch.equal(y, v[:, 2:3].expand_as(y))
    dy = draw(*y.shape, seed=3).to(dtype)
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), dy)
    bound = 2 * 64 * torch.finfo(torch.float32).eps * (dy * v[:, 2:3]).abs().sum(-1).max() / 8
    assert dq.abs().max() <= bound * k[:, 2].abs().max()
    assert dk.abs().max() <= bound * q.abs().sum(1).max()
    torch.testing.assert_close(
        dv[:, 2:3].double(),
        dy.double().sum(1, keepdim=True),
        rtol=0,
        atol=3 * torch.finfo(dtype).eps * float(dy.abs().sum(1).max()),
    )


VIEWS = {
    "heads first": lambda x: x.permute(0, 3, 2, 1)[..., :32],
    "one third of a fused projection": lambda x: x.unflatten(2, (3, -1))[:, :, 1],
    "every second channel": lambda x: x[..., ::2],
    "every second position, reversed batch": lambda x: x[:, ::2].flip(0),
    "one row for all": lambda x: x[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_strided_views(view) -> None:
    inputs = {name: draw(2, 40, 6, 32, seed=seed) for seed, name in enumerate("qkv")}
    three_way(
        lambda q, k, v: kernels.attention(view(q), view(k), view(v), causal=True),
        lambda q, k, v: ops.attention(view(q), view(k), view(v), causal=True),
        torch.float32,
        inputs,
    )


def test_each_input_has_strides_of_its_own() -> None:
    def views(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return q, k.transpose(1, 2).contiguous().transpose(1, 2), torch.cat((v, v), -1)[..., :32]

    three_way(
        lambda q, k, v: kernels.attention(*views(q, k, v), causal=True),
        lambda q, k, v: ops.attention(*views(q, k, v), causal=True),
        torch.float32,
        {name: draw(2, 40, 4, 32, seed=seed) for seed, name in enumerate("qkv")},
    )


def test_keys_out_of_range_are_never_read() -> None:
    q, k, v = qkv(2, 30, 200, 2, 2, 64).values()
    start, end = integers(70, 3), integers(200, 131)
    clean = kernels.attention(q, k, v, False, start, end)
    for row in range(2):
        for x in (k, v):
            x[row, : start[row]] = float("nan")
            x[row, end[row] :] = float("nan")
    assert torch.equal(kernels.attention(q, k, v, False, start, end), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_padding_or_its_batch(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(3, 100, 100, 2, 1, 64).values())
    batch = kernels.attention(q, k, v, True, integers(0, 37, 99))
    alone = kernels.attention(q[1:2, 37:], k[1:2, 37:], v[1:2, 37:], True)
    assert torch.equal(batch[1:2, 37:], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_varlen(causal: bool, dtype: torch.dtype) -> None:
    bounds = integers(0, 63, 63, 190, 200)  # lengths 63, none, 127, 10

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = [
            ops.attention(q[None, a:b], k[None, a:b], v[None, a:b], causal)[0]
            for a, b in pairwise(bounds.tolist())
        ]
        return torch.cat(pieces)

    three_way(
        lambda q, k, v: attention_varlen(q, k, v, bounds, 127, causal),
        plain,
        dtype,
        {"q": draw(200, 2, 64), "k": draw(200, 1, 64, seed=1), "v": draw(200, 1, 64, seed=2)},
    )


def test_varlen_equals_the_padded_batch_bit_for_bit() -> None:
    q, k, v = qkv(2, 70, 70, 2, 2, 32).values()
    padded = kernels.attention(q, k, v, key_end=integers(70, 33))
    packed = [torch.cat((x[0], x[1, :33])) for x in (q, k, v)]
    bounds = integers(0, 70, 103).int()
    with poison():
        y = attention_varlen(*packed, bounds, 80)
    assert torch.equal(y, torch.cat((padded[0], padded[1, :33])))


def test_forward_without_gradients_and_large_scores() -> None:
    q, k, v = qkv(1, 33, 65, 1, 1, 32).values()
    q = q * 100  # the largest weight is 1, exponentials would overflow without the maximum
    with torch.no_grad():
        # A score of 400 is known to 2e-5 in float32, and so is its weight.
        torch.testing.assert_close(
            kernels.attention(q, k, v), ops.attention(q, k, v), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: kernels.attention(q, k, v),
        lambda q, k, v: kernels.attention(q, k[:, :-1], v[:, :-1], True),
        lambda q, k, v: kernels.attention(q, k, v.flip(2), True),
        lambda q, k, v: kernels.attention(q, k, v, True, integers(1)),
        lambda q, k, v: kernels.attention(q * 1.001, k, v, True),
        lambda q, k, v: kernels.attention(q, k.detach() + 0 * k, v, True),
    ],
    ids=["not causal", "last key lost", "heads swapped", "first key lost", "scale", "no gradient"],
)
def test_the_rule_notices(wrong) -> None:
    with pytest.raises(AssertionError):
        three_way(
            wrong, partial(ops.attention, causal=True), torch.float32, qkv(1, 40, 40, 2, 2, 32)
        )


def test_errors() -> None:
    q, k, v = qkv(2, 4, 4, 4, 2, 32).values()
    calls = {
        "k has shape": lambda: kernels.attention(q, k[:1], v),
        "v has shape": lambda: kernels.attention(q, k, v[:, :2]),
        "4 query heads are not a multiple of 3": lambda: kernels.attention(
            q, *(x[:, :, :1].expand(-1, -1, 3, -1) for x in (k, v))
        ),
        "v is float16 but q is float32": lambda: kernels.attention(q, k, v.half()),
        "float64": lambda: kernels.attention(q.double(), k.double(), v.double()),
        "key_end has shape": lambda: kernels.attention(q, k, v, key_end=integers(4)),
        "key_start is float32": lambda: kernels.attention(q, k, v, key_start=draw(2)),
        "160 channels": lambda: kernels.attention(*(x.repeat(1, 1, 1, 5) for x in (q, k, v))),
        "expected \\(N, H, C\\)": lambda: attention_varlen(q, k, v, integers(0, 4), 4),
        "cu_seqlens has shape": lambda: attention_varlen(q[0], k[0], v[0], integers(0), 4),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
