"""Packing: one storage for weights that are read together, and nothing else changes."""

import copy
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from qwen2audio_core import quantize, tiny, weights
from qwen2audio_core.errors import InputError
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.packed_linear import side_by_side
from qwen2audio_core.packing import Alone, Projection, Separate, pack, projection
from qwen2audio_core.saving import save_model
from qwen2audio_core.weights import load_model


@pytest.fixture
def model(tmp_path) -> Qwen2Audio:
    tiny.write_random(tmp_path / "model", seed=3, dtype=torch.float32, std=0.125)
    return load_model(tmp_path / "model")


def groups(model: Qwen2Audio) -> Iterator[tuple[torch.nn.Linear, ...]]:
    for layer in [*model.language_model.model.layers, *model.audio_tower.layers]:
        attention = layer.self_attn
        yield attention.q_proj, attention.k_proj, attention.v_proj
    for layer in model.language_model.model.layers:
        yield layer.mlp.gate_proj, layer.mlp.up_proj


def test_names_and_values_stay(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    pack(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(dict(model.named_parameters())[name] is one for name, one in parameters.items())


def test_no_weight_is_stored_twice(model):
    pack(model)
    packed = [one for group in groups(model) for layer in group for one in layer.parameters()]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in packed}
    zeros = sum(layer.self_attn.q_proj.bias.nbytes for layer in model.audio_tower.layers)
    held = sum(storage.nbytes() for storage in storages.values())
    assert held == sum(one.nbytes for one in packed) + zeros
    assert len(storages) == 2 * (2 + 2) + 2  # weights and biases of q/k/v, weights of gate/up


def test_a_group_is_one_product_and_equals_its_layers(model):
    x = torch.randn(3, 5, 64)
    assert any(isinstance(projection(*group), Separate) for group in groups(model))
    for packed in (False, True):
        if packed:
            pack(model)
        for group in groups(model):
            joint = projection(*group)
            assert isinstance(joint, Separate) is False or not packed
            for ours, layer in zip(joint.split(x), group, strict=True):
                torch.testing.assert_close(ours, layer(x), rtol=1e-6, atol=1e-6)
            whole = joint(x, residual=torch.ones_like(joint(x)))
            expected = torch.cat([layer(x) for layer in group], -1) + 1
            torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)


def test_what_is_wanted_of_a_projection_stays_with_it(model):
    """A deterministic engine leaves no mark on the quantised layers of the model."""
    quantize.quantize(model, 8)
    layer = model.language_model.model.layers[0].mlp.down_proj
    x = torch.randn(quantize.FEW + 9, layer.in_features)
    before = layer(x)
    strict, plain = projection(layer, deterministic=True), projection(layer)
    assert torch.equal(strict(x)[:1], strict(x[:1])) and torch.equal(strict(x)[-1:], strict(x[-1:]))
    assert torch.equal(layer(x), before) and torch.equal(plain(x), before)


def test_packing_twice_moves_nothing(model):
    pack(model)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    pack(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_a_packed_model_is_saved_and_read_as_before(model, tmp_path):
    pack(model)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], one) for name, one in model.state_dict().items())


def test_the_file_is_never_written_to(model, tmp_path):
    """The weights were mapped from it; the packed ones are the process's own."""
    file = tmp_path / "model" / "model.safetensors"
    before = file.read_bytes()
    pack(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert file.read_bytes() == before


def test_training_moves_the_packed_weights(model):
    pack(model)
    attention = model.language_model.model.layers[0].self_attn
    joint = projection(attention.q_proj, attention.k_proj, attention.v_proj)
    ids = torch.arange(10)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids).square().mean().backward()
    before = joint.weight.clone()
    optimizer.step()
    assert attention.k_proj.weight.grad is not None
    assert not torch.equal(joint.weight, before)
    assert torch.equal(joint.weight[64:96], attention.k_proj.weight)


def test_an_encoder_bias_with_something_in_the_gap_is_not_taken_for_packed():
    q, k, v = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4)
    buffer = torch.randn(36)
    with torch.no_grad():
        weight = torch.randn(12, 4)
        for layer, part in zip((q, k, v), weight.split(4), strict=True):
            layer.weight.data = part
        q.bias.data, v.bias.data = buffer[:4], buffer[8:12]
    assert isinstance(projection(q, k, v), Separate)
    buffer[4:8] = 0
    joint = projection(q, k, v)
    assert type(joint) is Projection
    x = torch.randn(2, 4)
    torch.testing.assert_close(joint(x), torch.cat([q(x), k(x), v(x)], -1))


def test_side_by_side_sees_order_gaps_and_kinds():
    buffer = torch.randn(10, 3)
    assert torch.equal(side_by_side([buffer[:4], buffer[4:]]), buffer)
    assert side_by_side([buffer[4:], buffer[:4]]) is None
    assert side_by_side([buffer[:4], buffer[5:]]) is None
    assert side_by_side([buffer[:4], buffer[4:].clone()]) is None
    assert side_by_side([buffer[:4, :2], buffer[4:, :2]]) is None


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_groups_are_one_product_too(model, bits, tmp_path, monkeypatch):
    """Codes lie side by side; every layer, the state and a saved model are what they were."""
    monkeypatch.setattr(quantize, "_multiplies_bytes", lambda: False)
    quantize.quantize(model, bits)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = model(ids)
        pack(model)
        assert torch.equal(model(ids), logits)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    x = torch.randn(2, 64)
    for group in groups(model):
        if isinstance(group[0], quantize.QuantizedLinear):
            joint = projection(*group)
            # The tiny model's keys and values are 32 outputs each: int4 blocks hold 64.
            assert isinstance(joint, Alone) == (bits == 8 or len(group) == 2)
            expected = [layer(x) for layer in group]
            assert all(map(torch.equal, joint.split(x), expected))
            if isinstance(joint, Alone):
                assert joint.layer.qweight.data_ptr() == group[0].qweight.data_ptr()
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)
    places = [tensor.data_ptr() for tensor in after.values()]
    pack(model)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places


multiplies_bytes = pytest.mark.skipif(
    not quantize._multiplies_bytes(), reason="needs a CPU with AVX-512 VNNI or AMX"
)


@multiplies_bytes
def test_codes_in_an_order_of_their_own(model, tmp_path):
    quantize.quantize(model, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(10)[None]
    x = torch.randn(2, 64)
    quantised = [group for group in groups(model) if isinstance(group[0], quantize.QuantizedLinear)]
    assert quantised
    with torch.no_grad():
        logits = model(ids)
        pack(model)
        assert model.language_model.lm_head.qweight.is_mkldnn
        assert 0 < (model(ids) - logits).abs().max() < 0.01 * logits.abs().max()
        for group in quantised:
            joint = projection(*group)
            assert isinstance(joint, Separate)
            assert quantize.in_order(group) is group[0].shared[0]
            assert all(map(torch.equal, joint.split(x), [layer(x) for layer in group]))
            for layer in group:
                exact = F.linear(x, layer.widened(), layer.bias)
                assert (layer(x) - exact).abs().max() < 1e-3 * exact.abs().max()
            # Parts in another order, or some of them, are not what was joined.
            for others in (group[::-1], group[:-1], group[1:], group[:-1] * 2):
                assert quantize.in_order(others) is None
    twin = copy.deepcopy(model)
    assert not any(tensor.is_mkldnn for tensor in twin.buffers())
    pack(twin)
    whole = weakref.ref(quantised[0][0].shared[0])
    model.double().float()  # to another device it would be the same: apart, and as stored
    assert quantize.in_order(quantised[0]) is None
    assert whole() is None, "the codes are held twice"
    pack(model)
    assert quantize.in_order(quantised[0]).qweight.is_mkldnn
    with torch.no_grad():
        assert torch.equal(twin(ids), model(ids))
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)


@multiplies_bytes
def test_layers_in_order_are_read_as_they_are_now(model):
    """A bias that is replaced, codes that are loaded anew: the projection sees them."""
    quantize.quantize(model, 8)
    group = next(groups(model))
    other = {name: tensor.clone() for name, tensor in group[0].state_dict().items()}
    other["qweight"] = -other["qweight"]
    pack(model)
    joint, x = projection(*group), torch.randn(2, 64)
    assert quantize.in_order(group) is not None
    with torch.no_grad():
        q, k, v = joint.split(x)
        group[1].bias = group[1].bias + 3
        torch.testing.assert_close(joint.split(x)[1], k + 3)
        torch.testing.assert_close(group[1](x), k + 3)
        group[0].load_state_dict(other)
        assert quantize.in_order(group) is None
        bias = group[0].bias
        torch.testing.assert_close(joint.split(x)[0] - bias, bias - q, rtol=0.02, atol=0.02)
        assert torch.equal(joint.split(x)[2], v)


@multiplies_bytes
def test_two_threads_may_pack_what_a_third_runs(model):
    quantize.quantize(model, 8)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    group, x = next(groups(model)), torch.randn(1, 64).bfloat16()
    exact = [F.linear(x.float(), layer.widened(), layer.bias) for layer in group]
    failures: list[BaseException] = []
    done = threading.Event()

    def guarded(run):
        def body():
            try:
                run()
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=body)

    def ask():
        while not done.is_set():
            for layer, y in zip(group, exact, strict=True):
                assert (layer(x) - y).abs().max() < 0.05 * y.abs().max()

    with torch.inference_mode():
        for _ in range(20):
            model.load_state_dict(stored)
            done.clear()
            packers = [guarded(lambda: pack(model)) for _ in range(2)]
            reader = guarded(ask)
            reader.start()
            for thread in packers:
                thread.start()
            for thread in packers:
                thread.join()
            done.set()
            reader.join()
            assert not failures
            assert quantize.in_order(group) is not None
            assert all(torch.equal(model.state_dict()[name], stored[name]) for name in stored)


def test_quantised_groups_come_apart_and_together_again(model, monkeypatch):
    monkeypatch.setattr(quantize, "_multiplies_bytes", lambda: False)
    quantize.quantize(model, 8)
    pack(model)
    attention = model.language_model.model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert quantize.joint(parts) is not None
    model.double()  # to another device it would be the same
    assert quantize.joint(parts) is None
    pack(model)
    joint = quantize.joint(parts)
    assert joint is not None and joint.bias.dtype == torch.float64
    with torch.no_grad():
        parts[1].bias[0] += 1
    assert joint.bias[64] == parts[1].bias[0]


def test_adapters_are_refused(model):
    attention = model.language_model.model.layers[0].self_attn

    class Adapter(torch.nn.Linear): ...

    with pytest.raises(InputError, match="found a Adapter: merge adapters"):
        projection(attention.q_proj, Adapter(64, 64))


# --- straight from the files ----------------------------------------------------------------------


def test_a_load_that_converts_reads_into_the_packed_layout(tmp_path, monkeypatch):
    tiny.write_random(tmp_path / "model", seed=3, std=0.125)
    plain = load_model(tmp_path / "model")
    assert any(isinstance(projection(*group), Separate) for group in groups(plain))
    monkeypatch.setattr(weights, "PIECE_BYTES", 5000)  # many pieces, read in any order
    model = load_model(tmp_path / "model", dtype=torch.float32)
    for group in groups(model):
        assert type(projection(*group)) is Projection
    places = [parameter.data_ptr() for parameter in model.parameters()]
    pack(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    expected = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].float()), name
