"""The plain ops against closed forms, and attention's rule of visibility spelled out."""

import math

import pytest
import torch
import torch.nn.functional as F

from qwen2audio_core import ops

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


def test_rms_norm():
    x, weight = random(3, 5, 8), random(8)
    expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected)
    # In half precision the normed value is rounded before the weight, not after.
    low, weight = random(64, 128, dtype=torch.bfloat16), random(128, dtype=torch.bfloat16)
    normed = low.float() / (low.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    y = ops.rms_norm(low, weight, 1e-5)
    assert torch.equal(y, weight * normed.bfloat16())
    assert not torch.equal(y, (weight.float() * normed).bfloat16())


def test_layer_norm():
    x, weight, bias = random(3, 5, 8), random(8), random(8)
    centred = x - x.mean(-1, keepdim=True)
    expected = weight * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + bias
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, 1e-5), expected)


def test_gelu_is_the_exact_one():
    x = random(1000)
    torch.testing.assert_close(ops.gelu(x), x * (1 + torch.erf(x / math.sqrt(2))) / 2)


def test_swiglu():
    gate, up = random(7, 8), random(7, 8)
    torch.testing.assert_close(ops.swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up)


def test_rope_turns_pairs_by_the_angle():
    q, k = random(2, 5, 4, 8), random(2, 5, 2, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    cos, sin = ops.rope_tables(positions, 8, 10000.0, torch.float64)
    turned, _ = ops.rope(q, k, cos, sin)
    for channel in range(4):
        angle = positions.double() * 10000.0 ** (-2 * channel / 8)
        pair = torch.complex(q[..., channel], q[..., channel + 4])
        expected = pair * torch.polar(torch.ones_like(angle), angle)[:, :, None]
        got = torch.complex(turned[..., channel], turned[..., channel + 4])
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_rope_keeps_only_the_distance():
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16)

    def score(query_position, key_position):
        tables = [
            ops.rope_tables(torch.tensor([[p]]), 16, 10000.0, torch.float64)
            for p in (query_position, key_position)
        ]
        return (ops.rope(q, k, *tables[0])[0] * ops.rope(q, k, *tables[1])[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score(9, 4), score(9, 5), rtol=1e-2)


def attention_by_loops(q, k, v, causal, key_start, key_end):
    """The definition, one query and one key at a time."""
    B, T, H, C = q.shape
    S, G = k.shape[1:3]
    y = torch.zeros_like(q)
    for b in range(B):
        first = 0 if key_start is None else int(key_start[b])
        last = S if key_end is None else int(key_end[b])
        for i in range(T):
            seen = [j for j in range(first, last) if not causal or j <= i + S - T]
            if not seen:
                continue
            for h in range(H):
                g = h // (H // G)
                scores = torch.stack([q[b, i, h] @ k[b, j, g] / math.sqrt(C) for j in seen])
                weights = scores.softmax(0)
                y[b, i, h] = sum(w * v[b, j, g] for w, j in zip(weights, seen, strict=True))
    return y


CASES = [
    {"T": 5, "S": 5},
    {"T": 5, "S": 5, "causal": True},
    {"T": 3, "S": 7, "causal": True},
    {"T": 1, "S": 7, "causal": True},
    {"T": 5, "S": 5, "key_end": [5, 2]},
    {"T": 5, "S": 5, "key_end": [0, 5]},
    {"T": 5, "S": 5, "causal": True, "key_start": [0, 3]},
    {"T": 1, "S": 6, "causal": True, "key_start": [2, 0]},
    {"T": 4, "S": 6, "causal": True, "key_start": [1, 5], "key_end": [6, 6]},
    {"T": 4, "S": 6, "key_start": [1, 4], "key_end": [3, 4]},
]


@pytest.mark.parametrize("op", [ops.attention, ops.sdpa])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention(op, case, groups):
    q = random(2, case["T"], 4, 8)
    k, v = random(2, case["S"], groups, 8), random(2, case["S"], groups, 8)
    limits = [case.get(name) for name in ("key_start", "key_end")]
    limits = [None if limit is None else torch.tensor(limit) for limit in limits]
    expected = attention_by_loops(q, k, v, case.get("causal", False), *limits)
    got = op(q, k, v, case.get("causal", False), *limits)
    torch.testing.assert_close(got, expected)


def test_attention_control_the_other_alignment():
    """PyTorch's is_causal counts from the first key, which is wrong behind a cache."""
    q, k, v = random(1, 3, 1, 8), random(1, 7, 1, 8), random(1, 7, 1, 8)
    expected = attention_by_loops(q, k, v, True, None, None)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    wrong = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    assert (wrong - expected).abs().max() > 0.1


@pytest.mark.parametrize("op", [ops.attention, ops.sdpa])
def test_attention_takes_views_and_differentiates(op):
    wide = random(2, 5, 3, 4, 8).requires_grad_()
    q, k, v = wide.unbind(2)
    op(q, k, v, True, torch.tensor([0, 2])).sum().backward()
    assert wide.grad.isfinite().all() and wide.grad[:, :, 2].abs().max() > 0


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_bfloat16_query_alone_on_a_cpu(rows, narrow, monkeypatch):
    """It attends in float32 where that is faster, and else rounds as the fused kernel does."""
    monkeypatch.setattr(ops, "NARROW_PRODUCTS", narrow)
    shapes = ((rows, 1, 4, 64), (rows, 150, 2, 64), (rows, 150, 2, 64))
    q, k, v = (random(*shape, dtype=torch.float32).bfloat16() for shape in shapes)
    start = torch.arange(rows) * 7 if rows > 1 else None
    exact = ops.attention(q.double(), k.double(), v.double(), causal=True, key_start=start)
    y = ops.sdpa(q, k, v, causal=True, key_start=start)
    assert y.dtype == torch.bfloat16
    products = ops.attention_by_products(q, k, v, causal=True, key_start=start)  # rounds between
    assert (products == exact.bfloat16()).float().mean() < 0.9
    errors = [(one.double() - exact).square().mean().sqrt() for one in (y, products)]
    assert errors[0] < 0.8 * errors[1]
    same = (y == exact.bfloat16()).float().mean()
    assert same > 0.5 if narrow else same > 0.99


def test_cross_entropy():
    x, weight = random(6, 4).requires_grad_(), random(10, 4).requires_grad_()
    labels = torch.tensor([1, -100, 3, 9, -100, 0])
    loss = ops.cross_entropy(x, weight, labels)
    log_p = (x @ weight.T).log_softmax(-1)
    expected = -sum(log_p[i, labels[i]] for i in (0, 2, 3, 5)) / 4
    torch.testing.assert_close(loss, expected)
    assert ops.cross_entropy(x, weight, torch.full((6,), -100)).item() == 0
    loss.backward()
    assert (x.grad[[1, 4]] == 0).all() and x.grad.abs().sum() > 0
