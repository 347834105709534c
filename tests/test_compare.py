"""`compare` agrees where both agree, and names the module where a fault was planted."""

import json
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qwen2audio_core import frontend, install, ops, tiny
from qwen2audio_core.compare import Report, compare, measure, run
from qwen2audio_core.errors import InputError

pytest.importorskip("transformers")

RATE = 16_000
rng = np.random.default_rng(0)
# An odd and an even number of conv frames, so that the shorter clip is padded and one frame drops.
CLIPS = [
    (rng.normal(0, 0.1, samples).astype(np.float32), RATE) for samples in (47 * 160, 74 * 160 + 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compare") / "checkpoint"
    tiny.write_random(made, dtype=torch.float32, std=0.125)
    return made


@pytest.fixture(autouse=True, scope="module")
def one_processor() -> Iterator[None]:
    """transformers' processor takes seconds to read 3,000 added tokens, and never changes here."""
    from transformers import AutoProcessor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoProcessor, "from_pretrained", cache(AutoProcessor.from_pretrained))
        yield


def faulty(folder: Path, plant: Callable[[nn.Module], None], **options: object) -> Report:
    return compare(folder, CLIPS, "What is it?", prepare=plant, max_new_tokens=2, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_both_agree_in_every_dtype(folder: Path, dtype: torch.dtype) -> None:
    report = compare(folder, CLIPS, "What is it?", dtype=dtype, max_new_tokens=16)
    assert report.first is None, report.verdict()
    assert report.dtype == str(dtype).removeprefix("torch.")
    stages = [one.stage for one in report.stages]
    assert stages[:2] == ["log-mel", "prompt ids"] and stages[-1] == "language_model.lm_head"
    for name in ("audio_tower", "language_model.model"):
        assert all(f"{name}.layers.{i}" in stages for i in (0, 1))
    assert {"audio_tower.layer_norm", "multi_modal_projector.linear"} < set(stages)
    assert "language_model.model.layers.0 input" in stages
    if dtype in (torch.float64, torch.float32):
        assert report.our_ids == report.their_ids and len(report.our_ids) > 8


def test_text_alone_and_a_full_window(folder: Path) -> None:
    assert compare(folder, text="Hello", max_new_tokens=4).first is None
    whole = (rng.normal(0, 0.1, frontend.MAX_SAMPLES).astype(np.float32), RATE)
    report = compare(folder, [whole], max_new_tokens=2)
    assert report.first is None, report.verdict()


def wider_eps(model: nn.Module) -> None:
    model.language_model.model.layers[1].post_attention_layernorm.eps = 1e-2


def bent_weight(model: nn.Module) -> None:
    model.language_model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 0.05


def bent_audio_weight(model: nn.Module) -> None:
    model.audio_tower.layers[1].fc1.weight.data[3, 5] += 0.05


def other_theta(model: nn.Module) -> None:
    config = model.language_model.model.config
    object.__setattr__(config, "rope_theta", 10_500.0)


def other_gelu(model: nn.Module) -> None:
    model.audio_tower.layers[0].gelu_op = lambda x: nn.functional.gelu(x, approximate="tanh")


def other_head(model: nn.Module) -> None:
    model.language_model.lm_head.weight.data[7] *= 1.01


def swapped_clips(model: nn.Module) -> None:
    projector = model.multi_modal_projector
    forward = projector.forward
    projector.forward = lambda states: forward(states).flip(1)


@pytest.mark.parametrize(
    ("plant", "module", "stage"),
    [
        (wider_eps, "language_model.model.layers.1.post_attention_layernorm", None),
        (bent_weight, "language_model.model.layers.1.mlp.up_proj", None),
        (bent_audio_weight, "audio_tower.layers.1.fc1", None),
        (
            other_theta,
            "language_model.model.layers.0.self_attn",
            "language_model.model.layers.0.self_attn.o_proj input",
        ),
        (other_gelu, "audio_tower.layers.0", "audio_tower.layers.0.fc2 input"),
        (other_head, "language_model.lm_head", None),
        (swapped_clips, "language_model.model", "language_model.model.layers.0 input"),
    ],
)
def test_a_fault_is_found_where_it_was_planted(
    folder: Path, plant: Callable[[nn.Module], None], module: str, stage: str | None
) -> None:
    report = faulty(folder, plant)
    assert report.first is not None
    assert (report.module, report.first.stage) == (module, stage or module)
    assert module in report.verdict()


def test_a_fault_in_bfloat16(folder: Path) -> None:
    def plant(model: nn.Module) -> None:
        model.language_model.model.layers[1].mlp.up_proj.weight.data[:8] *= 2

    report = faulty(folder, plant, dtype=torch.bfloat16)
    assert report.module == "language_model.model.layers.1.mlp.up_proj"


def test_a_wrong_filterbank_is_the_frontends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window, halves = frontend.constants(128, torch.device("cpu"), torch.float32)
    wrong = [(heard, bands * 1.01) for heard, bands in halves]
    monkeypatch.setattr(frontend, "constants", lambda *_: (window, wrong))
    assert compare(folder, CLIPS, max_new_tokens=1).module == "log-mel"


def test_another_prompt_is_seen_before_anything_it_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2audio_core.chat.DEFAULT_SYSTEM", "You are a helpful assistanT.")
    report = compare(folder, text="Hello", max_new_tokens=1)
    assert report.module == "prompt ids"
    monkeypatch.setattr("qwen2audio_core.chat.DEFAULT_SYSTEM", "Short.")
    report = compare(folder, text="Hello", max_new_tokens=1)
    assert report.module == "prompt ids" and report.first.largest == float("inf")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["first"]["largest"] is None


def test_only_one_model_is_held_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2AudioForConditionalGeneration as Reference

    ours: list[weakref.ref[nn.Module]] = []
    load = Reference.from_pretrained

    def check(*args: object, **options: object) -> nn.Module:
        assert ours[0]() is None
        return load(*args, **options)

    monkeypatch.setattr(Reference, "from_pretrained", check)
    assert faulty(folder, lambda model: ours.append(weakref.ref(model))).first is None


def test_attention_that_cannot_be_told_apart_is_no_fault(folder: Path) -> None:
    def plant(model: nn.Module) -> None:
        for layer in model.language_model.model.layers:
            layer.self_attn.attention_op = ops.attention

    assert faulty(folder, plant).first is None


def test_measure() -> None:
    ours, theirs = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])
    assert measure("x", ours, theirs).largest == 2 and measure("x", ours, theirs).relative == 0.5
    for wrong in (torch.tensor([1.0, float("nan")]), torch.ones(3)):
        assert measure("x", wrong, theirs).relative == float("inf")
        assert measure("x", theirs, wrong).relative == float("inf")
    endless = torch.tensor([1.0, float("inf")])
    assert measure("x", endless, endless).relative == float("inf")
    assert measure("x", ours, torch.zeros(2)).relative == float("inf")
    assert measure("x", torch.zeros(2), torch.zeros(2)).relative == 0


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert run(str(folder), text="Hello", max_new_tokens=3) == 0
    shown = capsys.readouterr().out
    assert "logits" in shown and "everything agrees" in shown
    assert re.search(r"3 of\s+3 tokens are equal", shown)
    assert run(str(folder), text="Hello", max_new_tokens=3, as_json=True) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["first"] is None and content["equal_ids"] == 3
    assert [one["stage"].rpartition(".")[2] for one in content["stages"]] == [
        *("prompt ids", "embed_tokens", "0 input", "0", "1", "norm", "lm_head")
    ]


def test_without_transformers_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=re.escape(install.package("transformers"))):
        compare(folder, text="Hello")
