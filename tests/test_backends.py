"""Filling op slots: which functions run where, and that everything is put back."""

import copy

import pytest
import torch

from qwen2audio_core import backends, ops, tiny
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import clip_lengths, log_mel
from qwen2audio_core.model import Qwen2Audio


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Qwen2Audio(tiny.TINY).eval()


def slots(model):
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name.endswith("_op")
    }


def inputs():
    lengths = clip_lengths(8000)
    ids = torch.tensor([[5, *[tiny.TINY.audio_token_id] * lengths.audio_tokens, 6, 7]])
    mel = log_mel(torch.sin(torch.arange(8000) * 0.2))[None]
    return ids, mel, torch.tensor([lengths.conv_frames])


def test_every_slot_is_known_and_every_op_has_a_slot(model):
    names = {name.rsplit(".", 1)[1].removesuffix("_op") for name in slots(model)}
    assert names == set(backends.PLAIN)


def test_fill_and_restore(model):
    before = slots(model)
    handle = backends.use(model, attention="eager")
    assert handle.chosen == {"attention": "eager"}
    changed = {name for name, value in slots(model).items() if value is not before[name]}
    assert changed == {name for name in before if name.endswith("attention_op")}
    assert all(slots(model)[name] is ops.attention for name in changed)
    handle.restore()
    assert slots(model) == before


def test_restored_after_an_error(model):
    before = slots(model)
    with pytest.raises(ZeroDivisionError), backends.use(model, attention="eager"):
        raise ZeroDivisionError
    assert slots(model) == before


def test_nested(model):
    before = slots(model)
    with backends.use(model, attention="eager"):
        with backends.use(model, "torch"):
            assert slots(model) == before
        assert slots(model) != before
    assert slots(model) == before


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("audio_tower.layers.0", {"audio_tower.layers.0.self_attn.attention_op"}),
        ("audio_tower.layers.1-9", {"audio_tower.layers.1.self_attn.attention_op"}),
        (
            "language_model.model.layers.*.self_attn",
            {f"language_model.model.layers.{i}.self_attn.attention_op" for i in range(2)},
        ),
        (
            "*.layers.0-1",
            {f"audio_tower.layers.{i}.self_attn.attention_op" for i in range(2)},
        ),
    ],
)
def test_layers(model, layers, expected):
    before = slots(model)
    with backends.use(model, attention="eager", layers=layers):
        assert {n for n, f in slots(model).items() if f is not before[n]} == expected


def test_a_function_of_ones_own_runs(model):
    calls = []

    def mine(x, weight, eps):
        calls.append(x.shape)
        return ops.rms_norm(x, weight, eps)

    with torch.no_grad():
        expected = model(*inputs())
        with backends.use(model, rms_norm=mine) as handle:
            assert handle.chosen == {"rms_norm": "custom"}
            assert torch.equal(model(*inputs()), expected)
    assert len(calls) == 2 * tiny.TINY.text.num_hidden_layers + 1


def test_eager_attention_equals_the_fused_one(model):
    with torch.no_grad():
        expected = model(*inputs())
        with backends.use(model, attention="eager"):
            torch.testing.assert_close(model(*inputs()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention": "cuda"}, "attention has no backend 'cuda', choose torch, eager, triton"),
        ({"softmax": "torch"}, "unknown op 'softmax', a model has attention"),
        ({"rope": "torch", "layers": "audio_tower"}, "matches no module with a slot for rope"),
        ({"rope": "torch", "layers": "decoder.5-3"}, "matches no module"),
    ],
)
def test_what_makes_no_sense(model, arguments, message):
    before = slots(model)
    with pytest.raises(InputError, match=message):
        backends.use(model, **arguments)
    assert slots(model) == before


def test_a_missing_backend_raises_and_auto_says_why(model, monkeypatch):
    monkeypatch.setattr(backends, "find_kernels", lambda: (None, "no GPU in this test"))
    with pytest.raises(InputError, match="cannot run here: no GPU in this test"):
        backends.use(model, "triton")
    with pytest.raises(InputError, match="cannot run here: no GPU in this test"):
        backends.use(model, rms_norm="triton")
    handle = backends.use(model, "auto")
    assert set(handle.chosen.values()) == {"torch"}
    assert str(handle).endswith("swiglu: torch (no GPU in this test)")


def test_slots_are_no_state_and_survive_a_copy(model):
    assert not any("_op" in name for name in model.state_dict())
    with backends.use(model, attention="eager"):
        twin = copy.deepcopy(model)
    assert all(f is ops.attention for n, f in slots(twin).items() if n.endswith("attention_op"))
    assert all(f is ops.sdpa for n, f in slots(model).items() if n.endswith("attention_op"))
