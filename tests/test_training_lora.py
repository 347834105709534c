"""Adapters: identity at first, exact when merged, and PEFT's files both ways."""

import copy
import json

import pytest
import torch
from training_rows import checkpoint

from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.linear import Linear
from qwen2audio_core.training import lora
from qwen2audio_core.weights import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return checkpoint(tmp_path_factory.mktemp("base") / "model")


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 13)[None])


def filled(model, seed: int = 0) -> None:
    """An adapter as training might leave it: B is not zero any more."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters(model).values():
            parameter.normal_(0, 0.3)


def test_an_adapter_begins_as_nothing_and_alone_is_trained(base) -> None:
    model = load_model(base)
    before, names = scores(model), set(model.state_dict())
    paths = lora.add(model, lora.Settings(rank=4))
    assert torch.equal(scores(model), before)
    assert len(paths) == 2 * 7 and all(
        path.startswith("language_model.model.layers.") for path in paths
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(lora.parameters(model)) and len(trained) == 2 * len(paths)
    # The base keeps its names; the adapter's stand beside them.
    assert set(model.state_dict()) - names == trained


def test_y_is_the_formula(base) -> None:
    model = load_model(base, dtype=torch.float64)
    path = "language_model.model.layers.1.mlp.up_proj"
    weight = model.get_submodule(path).weight.clone()
    lora.add(model, lora.Settings(rank=3, alpha=6.0, patterns=(path,)))
    filled(model)
    layer = model.get_submodule(path)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = x @ weight.T + 2.0 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_disabled_is_the_base_and_merged_is_the_sum(base) -> None:
    model = load_model(base)
    before = scores(model)
    lora.add(model, lora.Settings(rank=4, patterns=("*_proj", "*.fc1")))
    filled(model)
    adapted = scores(model)
    assert (adapted - before).abs().max() > 1e-2
    with pytest.raises(ZeroDivisionError), lora.disabled(model):
        assert torch.equal(scores(model), before)
        raise ZeroDivisionError
    assert torch.equal(scores(model), adapted)
    lora.merge(model)
    assert not lora.layers(model) and set(model.state_dict()) == set(load_model(base).state_dict())
    torch.testing.assert_close(scores(model), adapted, rtol=1e-4, atol=1e-4)


def test_dropout_acts_only_while_training(base) -> None:
    model = load_model(base)
    lora.add(model, lora.Settings(rank=4, dropout=0.5))
    filled(model)
    assert torch.equal(scores(model), scores(model))
    model.train()
    assert not torch.equal(scores(model), scores(model))


def test_a_pattern_that_matches_nothing_is_an_error(base) -> None:
    model = load_model(base)
    with pytest.raises(InputError, match=r"no linear layer matches 'q_proj'.*self_attn.q_proj"):
        lora.add(model, lora.Settings(patterns=("q_proj",)))
    with pytest.raises(InputError, match="rank 0"):
        lora.Settings(rank=0)
    lora.add(model, lora.Settings())
    with pytest.raises(InputError, match="has an adapter already"):
        lora.add(model, lora.Settings())


def test_saved_and_loaded_is_the_same_adapter(base, tmp_path) -> None:
    model = load_model(base)
    lora.add(model, lora.Settings(rank=4, alpha=12.0))
    filled(model)
    lora.save(model, tmp_path / "adapter", base)
    again = load_model(base)
    found = lora.load(again, tmp_path / "adapter")
    assert (found.rank, found.alpha) == (4, 12.0)
    assert torch.equal(scores(again), scores(model))


def test_peft_loads_ours_and_we_load_theirs(base, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def reference():
        cls = transformers.Qwen2AudioForConditionalGeneration
        return cls.from_pretrained(base, dtype=torch.float32).eval()

    def their_scores(model) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(1, 13)[None]).logits

    ours = load_model(base)
    patterns = (
        "language_model.model.layers.*_proj",
        "language_model.lm_head",
        "audio_tower.layers.*.fc2",
    )
    lora.add(ours, lora.Settings(rank=4, alpha=12.0, patterns=patterns))
    filled(ours)
    lora.save(ours, tmp_path / "ours", base)
    theirs = peft.PeftModel.from_pretrained(reference(), tmp_path / "ours").eval()
    plain = their_scores(reference())
    adapted = sum("lora_A" in name for name, _ in theirs.named_parameters())
    assert adapted == len(lora.layers(ours))
    assert (their_scores(theirs) - plain).abs().max() > 1e-2  # it does something
    torch.testing.assert_close(their_scores(theirs), scores(ours), rtol=1e-4, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(base)
    lora.load(again, tmp_path / "theirs")
    assert lora.layers(again).keys() == lora.layers(ours).keys()
    torch.testing.assert_close(scores(again), scores(ours), rtol=1e-5, atol=1e-5)
    # They write the head's own weight along: of another model it is refused.
    other = load_model(base)
    with torch.no_grad():
        other.language_model.lm_head.weight[3] += 1
    with pytest.raises(CheckpointError, match="lm_head was another weight"):
        lora.load(other, tmp_path / "theirs")

    made = peft.get_peft_model(
        reference(), peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    made.save_pretrained(tmp_path / "made")
    fresh = load_model(base)
    lora.load(fresh, tmp_path / "made")
    torch.testing.assert_close(scores(fresh), their_scores(made.eval()), rtol=1e-4, atol=1e-4)


def test_a_broken_adapter_is_refused_in_one_line(base, tmp_path) -> None:
    model = load_model(base)
    lora.add(model, lora.Settings(rank=4))
    lora.save(model, tmp_path / "good")

    def refused(folder, match) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            lora.load(load_model(base), folder)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "not an adapter")
    config = json.loads((tmp_path / "good" / lora.CONFIG).read_text())
    for key, value, match in (
        ("use_dora", True, "use_dora True is not supported"),
        ("peft_type", "IA3", "not a LoRA adapter"),
        ("r", 5, "has shapes"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights 'pissa_niter_4' is not supp"),
        ("init_lora_weights", "olora", "belongs to weights that were changed as well"),
        ("alora_invocation_tokens", [1, 2], r"alora_invocation_tokens \[1, 2\] is not supported"),
    ):
        changed = copy.deepcopy(config) | {key: value}
        (tmp_path / "good" / lora.CONFIG).write_text(json.dumps(changed))
        refused(tmp_path / "good", match)
    for begin in (False, None, "gaussian", "eva", "orthogonal"):
        changed = config | {"init_lora_weights": begin, "alora_invocation_tokens": None}
        (tmp_path / "good" / lora.CONFIG).write_text(json.dumps(changed))
        lora.load(load_model(base), tmp_path / "good")
    (tmp_path / "good" / lora.CONFIG).write_text(json.dumps(config))
    (tmp_path / "good" / lora.WEIGHTS).write_bytes(b"short")
    refused(tmp_path / "good", "broken")


def test_only_plain_layers_are_left_after_a_merge_in_bfloat16(base) -> None:
    model = load_model(base, dtype=torch.bfloat16)
    lora.add(model, lora.Settings(rank=4))
    layer = next(iter(lora.layers(model).values()))
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    filled(model)
    expected = layer.weight.float() + layer.scale * layer.lora_B @ layer.lora_A
    path = next(iter(lora.layers(model)))
    lora.merge(model)
    merged = model.get_submodule(path)
    assert type(merged) is Linear and torch.equal(merged.weight, expected.to(torch.bfloat16))
