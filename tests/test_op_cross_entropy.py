"""Fused linear and cross entropy against the plain op, by the three-way rule."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from interpreter import DEVICE
from tolerance import DTYPES, three_way
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qwen2audio_kernels as kernels
from qwen2audio_core import ops

FILE = import_module("qwen2audio_kernels.cross_entropy")  # plain attribute access gives the op
IGNORE = -100


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def case(P: int, V: int, D: int) -> dict[str, Tensor]:
    labels = torch.arange(P) * 31 % V
    labels[1::3] = IGNORE
    labels[-1] = V - 1
    return {
        "x": 2 * draw(P, D),
        "weight": draw(V, D, seed=1) * D**-0.5 * 2,
        "labels": labels.to(DEVICE),
    }


@pytest.fixture
def slices_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """slices_for(P, V): at most three eighths of the rows and of the words at a time, or 16 rows.

    Real slices have 128 rows or more. With few or odd numbers of rows MKL adds up a long sum one
    product after another, five times less exactly than for 16, so a large V goes with P > 16.
    """

    def cut(P: int, V: int) -> None:
        monkeypatch.setattr(FILE, "SLICE_BYTES", int(4 * V * (16 if P > 16 else 3 * P / 8)))

    return cut


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("P", "V", "D"), [(1, 7, 5), (33, 127, 64), (24, 1000, 31), (24, 4500, 16)]
)
def test_cross_entropy(
    P: int, V: int, D: int, dtype: torch.dtype, slices_for: Callable[[int, int], None]
) -> None:
    slices_for(P, V)
    three_way(kernels.cross_entropy, ops.cross_entropy, dtype, case(P, V, D))


def test_a_certain_word_whose_logit_is_rounded_twice(
    slices_for: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second product rounds a logit otherwise, a word of probability 1 keeps it.

    The logits of backward are made one unit in the last place larger, as another order of summing
    would make some of them.
    """
    P, V, D = 16, 64, 8
    slices_for(P, V)
    x = draw(P, D).bfloat16()
    x[:, 0] = 8.0
    weight = (draw(V, D, seed=1) * 0.01).bfloat16()
    weight[11, 0] = 2.0  # its logit is about 16, every other one about 0
    labels = torch.full((P,), 11, device=DEVICE)
    make_gradient = FILE._to_gradient

    def nudged(logits: Tensor, *rest: Any) -> None:
        if logits.shape[1] < V:  # of backward
            logits.mul_(1 + 2**-7)
        make_gradient(logits, *rest)

    monkeypatch.setattr(FILE, "_to_gradient", nudged)
    found = {}
    for name, function in (("kernel", kernels.cross_entropy), ("plain", ops.cross_entropy)):
        leaf = weight.clone().requires_grad_()
        function(x, leaf, labels).backward()
        found[name] = leaf.grad[11, 0].float().item()  # e of word 11, times 8
    assert abs(found["plain"]) < 1e-3
    assert abs(found["kernel"]) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_slice(dtype: torch.dtype) -> None:
    three_way(kernels.cross_entropy, ops.cross_entropy, dtype, case(20, 300, 48))


def test_closed_form() -> None:
    """Two words with logits 0 and log 3: probabilities 1/4 and 3/4."""
    x = torch.tensor([[1.0], [1.0]], device=DEVICE, requires_grad=True)
    log3 = 1.0986122886681098
    weight = torch.tensor([[0.0], [log3]], device=DEVICE, requires_grad=True)
    loss = kernels.cross_entropy(x, weight, torch.tensor([0, 1], device=DEVICE))
    loss.backward()
    expected = -(torch.tensor(0.25).log() + torch.tensor(0.75).log()) / 2
    torch.testing.assert_close(loss.detach().cpu(), expected)
    # e = p - onehot, over two positions: word 0 has (1/4 - 1 + 1/4) / 2, word 1 the opposite.
    torch.testing.assert_close(weight.grad.flatten().cpu(), torch.tensor([-0.25, 0.25]))
    torch.testing.assert_close(x.grad.flatten().cpu(), torch.tensor([0.375, -0.125]) * log3)


@pytest.mark.parametrize("ignore_index", [0, 5, -1])
def test_ignore_index_and_int32_labels(
    ignore_index: int, slices_for: Callable[[int, int], None]
) -> None:
    slices_for(12, 40)
    inputs = case(12, 40, 8)
    inputs["labels"] = (
        (torch.arange(12, dtype=torch.int32) % 7 - 1).clamp(min=ignore_index).to(DEVICE)
    )
    three_way(
        lambda x, weight, labels: kernels.cross_entropy(x, weight, labels, ignore_index),
        lambda x, weight, labels: ops.cross_entropy(x, weight, labels.long(), ignore_index),
        torch.float32,
        inputs,
    )


@pytest.mark.parametrize("gradients", [(), ("x",), ("weight",)])
def test_frozen_parts(gradients: tuple[str, ...], slices_for: Callable[[int, int], None]) -> None:
    slices_for(9, 200)
    three_way(kernels.cross_entropy, ops.cross_entropy, torch.float32, case(9, 200, 16), gradients)


def test_strided_inputs(slices_for: Callable[[int, int], None]) -> None:
    slices_for(8, 50)
    inputs = case(8, 50, 12)
    inputs["labels"] = inputs["labels"].repeat_interleave(2)
    three_way(
        lambda x, weight, labels: kernels.cross_entropy(x.T[:, ::2], weight.T, labels[::2]),
        lambda x, weight, labels: ops.cross_entropy(x.T[:, ::2], weight.T, labels[::2]),
        torch.float32,
        {**inputs, "x": draw(24, 8), "weight": draw(12, 50, seed=1)},
    )


def test_everything_ignored_and_no_positions() -> None:
    for P in (4, 0):
        x = draw(P, 8).requires_grad_()
        weight = draw(30, 8, seed=1).requires_grad_()
        loss = kernels.cross_entropy(x, weight, torch.full((P,), IGNORE, device=DEVICE))
        loss.backward()
        assert loss.item() == 0.0
        assert x.grad.shape == (P, 8)
        assert x.grad.eq(0).all()
        assert weight.grad.eq(0).all()


@pytest.mark.parametrize("label", [-1, 30, 2**40])
def test_a_label_that_is_no_word_makes_the_loss_nan(label: int) -> None:
    labels = torch.tensor([3, label], device=DEVICE)
    assert kernels.cross_entropy(draw(2, 8), draw(30, 8, seed=1), labels).isnan()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.found = max(self.found, result.nbytes)
        return result


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    P, V, D = 24, 600, 4
    monkeypatch.setattr(FILE, "SLICE_BYTES", P * V * 4 // 6)
    inputs = case(P, V, D)
    found = {}
    for name, function in (("kernel", kernels.cross_entropy), ("plain", ops.cross_entropy)):
        x, weight = (inputs[k].clone().requires_grad_() for k in ("x", "weight"))
        with Largest() as largest:
            function(x, weight, inputs["labels"]).backward()
        found[name] = largest.found
    assert found["plain"] == P * V * 4
    assert found["kernel"] <= P * V * 4 // 6


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [("x",), ("x", "weight")], ids=["frozen head", "both"])
def test_peak_memory_is_a_quarter_of_the_plain_one(gradients: tuple[str, ...]) -> None:
    """At the model's vocabulary and 2,048 positions, beside the inputs and their gradients."""
    P, V, D = 2048, 156032, 4096
    x = torch.randn(P, D, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(V, D, device=DEVICE, dtype=torch.bfloat16) * D**-0.5
    labels = torch.randint(V, (P,), device=DEVICE)
    inputs = {"x": x, "weight": weight}
    for name in gradients:
        inputs[name].requires_grad_()
    results = sum(inputs[name].nbytes for name in gradients)
    peaks = []
    for function in (kernels.cross_entropy, ops.cross_entropy):
        function(x[:8], weight, labels[:8]).backward()  # compile, libraries' workspaces
        x.grad = weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(x, weight, labels).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - results)
        x.grad = weight.grad = None
    assert peaks[0] <= peaks[1] / 4, f"{peaks[0] / 2**20:.0f} MiB against {peaks[1] / 2**20:.0f}"


def test_errors() -> None:
    x, weight = torch.ones(3, 4, device=DEVICE), torch.ones(9, 4, device=DEVICE)
    labels = torch.zeros(3, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match=r"^cross_entropy: x is float64; .* plain op"):
        kernels.cross_entropy(x.double(), weight.double(), labels)
    with pytest.raises(ValueError, match=r"^cross_entropy: weight is float16 but x is float32"):
        kernels.cross_entropy(x, weight.half(), labels)
    with pytest.raises(ValueError, match=r"^cross_entropy: labels is float32, expected int32 or"):
        kernels.cross_entropy(x, weight, labels.float())
    with pytest.raises(ValueError, match=r"^cross_entropy: x has shape \(1, 3, 4\), expected"):
        kernels.cross_entropy(x[None], weight, labels)
    with pytest.raises(ValueError, match=r"^cross_entropy: weight has shape \(9, 3\), expected"):
        kernels.cross_entropy(x, weight[:, :3], labels)
    with pytest.raises(ValueError, match=r"^cross_entropy: labels has shape \(2,\), expected"):
        kernels.cross_entropy(x, weight, labels[:2])
