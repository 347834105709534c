"""Quantised linear layers, the layout they are stored in, and how far they are from the plain ones.

Bounds are closed forms: half a step for a weight, units of rounding for a product.
"""

import copy
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2audio_core import quantize, tiny, weights
from qwen2audio_core.errors import InputError
from qwen2audio_core.quantize import QuantizedLinear, Scheme

U16, U32 = 2.0**-8, 2.0**-24  # largest relative error of rounding to bfloat16 and to float32
KINDS = ("normal", "shifted", "outliers", "constant", "zero", "tiny", "huge")
IDS = torch.tensor([[1, 5, 9, 300, 7]])
# Two text layers whose widths take groups of 128 and of 64, and a key projection of 32 outputs.
CONFIG = replace(tiny.TINY, text=replace(tiny.TINY.text, hidden_size=128, intermediate_size=192))


def weight(kind: str, outputs: int, inputs: int) -> Tensor:
    w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02
    if kind == "outliers":
        w[::7, ::31] *= 100
    return {
        "shifted": w + 3,
        "constant": torch.full_like(w, 0.1),
        "zero": torch.zeros_like(w),
        "tiny": w * 1e-37,
        "huge": w * 1e38,
    }.get(kind, w)


def steps(layer: QuantizedLinear) -> Tensor:
    """The distance of neighbouring codes, for every weight (N, K), float64."""
    if layer.bits == 8:
        return layer.scales.double()[:, None].expand(layer.out_features, layer.in_features)
    scale = layer.scales[:, : layer.out_features, 0].double()
    return scale.repeat_interleave(layer.group, 0).T


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 384), (33, 64), (1, 96)])
def test_no_weight_moves_by_more_than_half_a_step(outputs, inputs, bits, kind, dtype) -> None:
    w = weight(kind, outputs, inputs).to(dtype)
    layer = QuantizedLinear.from_weight(w, bits=bits)
    moved = (layer.widened(torch.float64) - w.double()).abs()
    step = steps(layer)
    # (w - zero) / scale is computed in float32 from values of the size of w and 16 steps.
    assert (moved <= step / 2 + 4 * U32 * (w.double().abs() + 16 * step)).all()
    # And a step is no larger than the range asks for: 1/127 of it, 1/16 for int4, and what rounding
    # the scale and the zero to bfloat16 adds.
    values = w.double().unflatten(1, (-1, layer.group))
    low, high = values.amin(-1), values.amax(-1)
    if bits == 8:
        span, zero = torch.maximum(-low, high) / 127, 0.0
    else:
        span, zero = (high - low) / 16, torch.maximum(-low, high)
    limit = (span + U16 * zero / 7.5) * (1 + 2 * U16) + torch.finfo(torch.bfloat16).tiny
    assert (step.unflatten(1, (-1, layer.group))[..., 0] <= limit * (1 + 8 * U32)).all()


def test_int8_of_known_weights() -> None:
    layer = QuantizedLinear.from_weight(torch.tensor([[127.0, -63.0, 0.6, 0.4], [0, 0, 0, 0]]))
    assert layer.scales.tolist()[0] == 1 and layer.qweight.dtype == torch.int8
    assert layer.qweight.tolist() == [[127, -63, 1, 0], [0, 0, 0, 0]]


def test_int4_of_known_weights_lies_as_documented() -> None:
    codes = torch.arange(70 * 128).reshape(70, 128) * 7 % 16
    codes[:, 0], codes[:, 1] = 0, 15  # every row reaches both ends: scale and zero are exact
    layer = QuantizedLinear.from_weight((codes - 8.0) * 0.25, bits=4)
    stored, scales = layer.stored()
    assert stored.shape == (2, 128, 32) and scales.shape == (1, 128, 2)
    assert not scales[:, 70:].any()
    levels = layer.widened(torch.float64)
    assert levels.sub((codes - 8.0) * 0.25).abs().max() <= layer.scales[..., 0].max() / 2
    for output, inputs in ((0, 0), (31, 5), (32, 5), (63, 127), (64, 3), (69, 100)):
        byte = int(stored[output // 64, inputs, output % 32])
        code = byte >> 4 if output % 64 >= 32 else byte & 15
        scale, zero = scales[0, output].double().tolist()
        assert levels[output, inputs] == (code - 8) * scale + zero


@pytest.mark.parametrize("bits", [8, 4])
def test_a_worse_rounding_is_noticed(bits, monkeypatch) -> None:
    monkeypatch.setattr(Tensor, "round", Tensor.floor)
    with pytest.raises(AssertionError):
        test_no_weight_moves_by_more_than_half_a_step(100, 384, bits, "normal", torch.float32)


# --- products -----------------------------------------------------------------------------------


def check_product(layer: QuantizedLinear, x: Tensor, y: Tensor, u: float, moved: float) -> None:
    """|y - exact| within rounding: x by `moved`, w by `u` and y by `u`, twice with the bias.

    Sums of K products in float32, in any order, are off by K units at most.
    """
    w, bias = layer.widened(torch.float64), layer.bias
    product = x.double() @ w.T
    exact = product if bias is None else product + bias.double()
    size = x.double().abs() @ w.abs().T
    unit = moved + (layer.in_features + 4) * U32
    limit = unit * size + u * (product.abs() + unit * size + exact.abs()) * (1 + u)
    assert y.shape == exact.shape and y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 5, quantize.FEW, quantize.FEW + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_product(bits, rows, bias, dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2, 384, generator=generator).to(dtype)[:, 1]  # rows lie apart
    b = torch.randn(200, generator=generator).to(dtype) if bias else None
    layer = QuantizedLinear.from_weight(weight("shifted", 200, 384), b, bits)
    few = rows <= quantize.FEW
    u = max(U16, torch.finfo(dtype).eps / 2) if few else torch.finfo(dtype).eps / 2
    # Few rows: x is rounded to bfloat16. Many: the weights are, to x's dtype.
    moved = (0.0 if dtype == torch.bfloat16 else U16) if few else u
    check_product(layer, x, layer(x), u, moved)
    if few and quantize._cpu_block():  # rounding x itself shows that it was a kernel that ran
        widened = F.linear(x, layer.widened(dtype), b)
        assert not torch.equal(layer(x), widened) or dtype == torch.bfloat16


bytes_are_multiplied = pytest.mark.skipif(
    not quantize._multiplies_bytes(), reason="needs a CPU with AVX-512 VNNI or AMX"
)


@bytes_are_multiplied
@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_x_in_two_bytes_is_nearly_exact(kind) -> None:
    """No number of x moves by more than half of its row's 1/32639; its first byte alone would."""
    layer = QuantizedLinear.from_weight(weight(kind, 200, 384))
    layer.arrange()
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1))
    x[:, ::50] *= 30
    x[3] = 0
    w = layer.widened(torch.float64)
    unit = x.double().abs().amax(-1, keepdim=True) / (127 * 257)
    limit = unit / 2 * 1.02 * w.abs().sum(-1) + 8 * U32 * (x.double().abs() @ w.abs().T)
    exact = x.double() @ w.T
    assert ((layer(x).double() - exact).abs() <= limit).all()
    assert layer(x)[3].eq(0).all()
    coarse = (x.double() / unit / 256).round() * unit * 256
    assert ((coarse @ w.T - exact).abs() > limit).any()
    # Rounding to whole numbers is off by 1 / sqrt(12) in the mean; to every second, by twice that.
    error = ((layer(x).double() - exact) / (unit * w.norm(dim=-1)))[[0, 1, 2, 4]]
    assert 0.24 < error.square().mean().sqrt() < 0.34


@bytes_are_multiplied
def test_the_codes_are_held_once_and_stay_what_they_were() -> None:
    layer = QuantizedLinear.from_weight(weight("normal", 70, 96), torch.randn(70))
    x = torch.randn(3, 96)
    before, widened = {k: v.clone() for k, v in layer.state_dict().items()}, layer.widened()
    plain = layer(x)
    layer.arrange()
    y = layer(x)
    assert not torch.equal(y, plain)
    torch.testing.assert_close(y, plain, rtol=0, atol=4 * U16)
    assert layer.qweight.is_mkldnn and "qweight" in dict(layer.named_buffers())
    assert torch.equal(layer.widened(), widened)
    assert torch.equal(layer.widened(torch.float32, 64, 70), widened[64:])
    twin = copy.deepcopy(layer)
    for one in (layer, twin):
        after = one.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
    for one in (twin, pickle.loads(pickle.dumps(layer)), layer.double().float()):
        assert not one.qweight.is_mkldnn and torch.equal(one(x), plain)
        one.arrange()
        assert torch.equal(one(x), y)
    other = QuantizedLinear.from_weight(weight("shifted", 70, 96), torch.randn(70))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), plain)


@bytes_are_multiplied
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_rows_in_bytes_are_the_rows_alone(dtype, monkeypatch) -> None:
    monkeypatch.setattr(quantize, "PIECE", 4096)  # several pieces
    layer = QuantizedLinear.from_weight(weight("normal", 300, 256), torch.randn(300).to(dtype))
    layer.arrange()
    x = torch.randn(2, 200, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = layer(x)
    check_product(layer, x, together, torch.finfo(dtype).eps / 2, 2.0**-12)
    assert torch.equal(together[1, 150:], layer(x[1, 150:]))
    assert torch.equal(together[0, 7], layer(x[0, 7]))
    assert layer(x[:, :0]).shape == (2, 0, 300)
    across = x[0].T.contiguous().T
    assert across.stride() == (1, 200) and torch.equal(layer(across), together[0])


@bytes_are_multiplied
def test_the_first_call_leaves_nothing_of_its_surroundings() -> None:
    program = """
import torch
from qwen2audio_core.quantize import QuantizedLinear
layer = QuantizedLinear.from_weight(torch.eye(256)[:200])
x = torch.linspace(-1, 1, 512).view(2, 256)
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")
layer.arrange()
y = layer(x)
torch.set_default_device("cpu")
print(layer.qweight.is_mkldnn, float((y - x[:, :200]).abs().max()) < 1e-4)
"""
    assert printed(program) == ["True", "True"]


def printed(program: str, **environment: str) -> list[str]:
    """The words that a program writes in a process of its own, which writes no errors."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    return done.stdout.split()


FORBIDDEN = """
import torch
from qwen2audio_core import quantize
layer = quantize.QuantizedLinear.from_weight(torch.ones(64, 512))
layer.arrange()
y = layer(torch.ones(3, 512))
print(layer.qweight.is_mkldnn, float((y - 512).abs().max()))
"""


@bytes_are_multiplied
@pytest.mark.parametrize("most", ["AVX512_CORE", "AVX2", "DEFAULT"])
def test_bytes_are_not_multiplied_where_sums_would_overflow(most) -> None:
    used, error = printed(FORBIDDEN, ONEDNN_MAX_CPU_ISA=most)
    assert used == str(most == "DEFAULT") and float(error) <= 512 * U16


@pytest.mark.parametrize("bytes_", [pytest.param(True, marks=bytes_are_multiplied), False])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_number_that_is_none_spoils_its_row_alone(wrong, bytes_, monkeypatch) -> None:
    monkeypatch.setattr(quantize, "_multiplies_bytes", lambda: bytes_)
    layer = QuantizedLinear.from_weight(weight("normal", 70, 96))
    layer.arrange()
    x = torch.randn(3, 96)
    y = layer(x)
    x[1, 7] = wrong
    assert not layer(x)[1].isfinite().any()
    assert torch.equal(layer(x)[::2], y[::2])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bound_notices(bits) -> None:
    layer = QuantizedLinear.from_weight(weight("normal", 64, 256), bits=bits)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    check_product(layer, x, layer(x), U16, 0.0)
    for wrong in (x.roll(1, 1), x * 1.02):
        with pytest.raises(AssertionError):
            check_product(layer, x, layer(wrong), U16, 0.0)
    layer.scales.mul_(1.02)
    with pytest.raises(AssertionError):
        check_product(copy.deepcopy(layer), x, layer(x) / 1.02, U16, 0.0)


@pytest.mark.parametrize("bits", [8, 4])
def test_float64_and_gradients_use_the_widened_weights(bits) -> None:
    layer = QuantizedLinear.from_weight(weight("normal", 70, 128), torch.randn(70), bits).double()
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    w = layer.widened(torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, w, layer.bias), rtol=1e-14, atol=1e-14)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, -1), rtol=1e-14, atol=1e-14)
    low = torch.randn(3, 128).bfloat16().requires_grad_()
    layer.bfloat16()(low).sum().backward()
    assert low.grad is not None and low.grad.any()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_its_batch(bits) -> None:
    layer = QuantizedLinear.from_weight(weight("normal", 192, 256), torch.randn(192), bits)
    x = torch.randn(quantize.FEW + 9, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = layer.bfloat16()(x, deterministic=True)
    for rows in (slice(0, 1), slice(5, 8), slice(64, 137)):
        assert torch.equal(layer(x[rows], deterministic=True), together[rows])


@pytest.mark.parametrize("bits", [8, 4])
def test_joined_layers_are_the_layers_behind_one_another(bits) -> None:
    x = torch.randn(2, 128).bfloat16()
    parts = [
        QuantizedLinear.from_weight(
            weight("normal", n, 128) + n, torch.ones(n).bfloat16() if n != 32 else None, bits
        )
        for n in (64, 32, 100)
    ]
    joint = QuantizedLinear.joined(parts)
    assert joint.out_features == 196
    assert torch.equal(joint(x), torch.cat([part(x) for part in parts], -1))
    half = QuantizedLinear.joined([part.half() for part in parts])
    assert half.bias.dtype == torch.float16 and half(x.half()).dtype == torch.float16


def test_casts_leave_the_codes() -> None:
    layer = QuantizedLinear.from_weight(weight("tiny", 64, 128), torch.ones(64), 4)
    before = layer.widened(torch.float64)
    layer.half().float()  # in float16 these scales would be zero
    assert layer.bias.dtype == torch.float32 and layer.scales.dtype == torch.bfloat16
    assert torch.equal(layer.widened(torch.float64), before) and before.any()
    assert torch.equal(copy.deepcopy(layer).widened(torch.float64), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: QuantizedLinear.from_weight(w, bits=3), "3 bits"),
        (lambda w: QuantizedLinear.from_weight(w, bits=4, group=48), "group of 48"),
        (lambda w: QuantizedLinear.from_weight(w[:, :50], bits=4), "50 inputs"),
        (lambda w: QuantizedLinear.from_weight(w / 0, bits=4), "NaN or infinity"),
        (lambda w: QuantizedLinear.from_weight(w * float("nan")), "NaN or infinity"),
        (lambda w: quantize.quantize(nn.Linear(64, 64), 4), "names no linear layer"),
    ],
)
def test_errors(call, message) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(weight("normal", 64, 64))
    assert "\n" not in str(caught.value)


CAPABILITY = """
import torch
from qwen2audio_core import quantize
from qwen2audio_core.quantize import QuantizedLinear
torch.manual_seed(0)
w, x = torch.randn(200, 384) * 0.02, torch.randn(3, 384).bfloat16()
layer = QuantizedLinear.from_weight(w, bits=4)
exact = x.double() @ layer.widened(torch.float64).T
error = (layer(x).double() - exact).norm() / exact.norm()
qweight, scales = layer.stored()
print(quantize._cpu_block(), int(qweight.long().sum()), float(scales.double().sum()), float(error))
"""


def test_other_cpus_read_the_same_codes() -> None:
    found = {}
    for capability in ("default", "avx2"):
        words = printed(CAPABILITY, ATEN_CPU_CAPABILITY=capability)
        block, codes, scales, error = map(float, words)
        found[capability] = (codes, scales)
        assert error < U16, capability  # that of rounding y, and of w where no kernel fits
        if capability == "avx2" and torch.backends.cpu.get_cpu_capability() != "DEFAULT":
            assert block == 32
    torch.manual_seed(0)
    qweight, scales = QuantizedLinear.from_weight(torch.randn(200, 384) * 0.02, bits=4).stored()
    here = (float(qweight.long().sum()), float(scales.double().sum()))
    assert found == {"default": here, "avx2": here}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_triton_reads_the_same_codes(bits, dtype, monkeypatch) -> None:
    """The kernel runs in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    w, b = weight("shifted", 70, 256), torch.randn(70).to(dtype)
    plain = QuantizedLinear.from_weight(w, b, bits)
    monkeypatch.setattr(quantize, "_triton", lambda device: True)
    layer = QuantizedLinear.from_weight(w.to(device), b.to(device), bits)
    assert (layer.form == quantize.ROWS) == (bits == 4)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(layer.stored(), plain.stored(), strict=True))
    assert torch.equal(layer.widened().cpu(), plain.widened())
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    u = torch.finfo(dtype).eps / 2
    check_product(plain, x, layer(x.to(device)).cpu(), u, u)
    state = layer.state_dict()
    assert torch.equal(state["qweight"].cpu(), plain.stored()[0])


# --- models and checkpoints ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A small bfloat16 checkpoint, never written to."""
    folder = tmp_path_factory.mktemp("made") / "plain"
    tiny.write_random(folder, CONFIG, std=0.1)
    return folder


def test_quantize_replaces_the_language_model_alone(made) -> None:
    model = weights.load_model(made)
    before = {path: type(module) for path, module in model.named_modules()}
    paths = quantize.quantize(model, 4)
    assert len(paths) == 7 * CONFIG.text.num_hidden_layers + 1
    assert "language_model.lm_head" in paths
    for path, module in model.named_modules():
        assert type(module) is (QuantizedLinear if path in paths else before[path])
    assert quantize.scheme_of(model) == Scheme(4)
    assert {layer.group for layer in map(model.get_submodule, paths)} == {128, 64}
    part = weights.load_model(made)
    assert quantize.quantize(part, 8, modules="*.0.mlp.up_proj") == [
        "language_model.model.layers.0.mlp.up_proj"
    ]


# --- accuracy -----------------------------------------------------------------------------------


def test_accuracy_of_8_and_4_bits_and_of_nonsense(made) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (4, 9), generator=generator)
    prompts = [{"ids": ids}]
    model = weights.load_model(made)
    reference = quantize.answer(model, prompts, 8)
    same = quantize.accuracy(model, reference)
    assert (same.relative_rms, same.largest, same.agreement, same.prefix) == (0, 0, 1, 1)
    assert same.tokens == 32
    found = {}
    for bits in (8, 4):
        quantize.quantize(changed := weights.load_model(made), bits)
        found[bits] = quantize.accuracy(changed, reference)
    model.language_model.lm_head.weight.data = model.language_model.lm_head.weight.roll(1, 0)
    nonsense = quantize.accuracy(model, reference)
    assert 0 < found[8].relative_rms < found[4].relative_rms < nonsense.relative_rms
    assert nonsense.agreement < found[4].agreement <= found[8].agreement
    assert found[8].prefix <= found[8].agreement  # an answer's prefix is part of what agrees
