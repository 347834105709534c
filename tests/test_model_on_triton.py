"""The whole model with every op on Triton against the plain one: logits, decoding, gradients.

A batch has what makes the ops' lives hard at once: clips of two lengths, so that frames are hidden
from the encoder; a row padded at the left; fewer key heads than query heads; odd lengths.
"""

from collections.abc import Callable

import pytest
import torch
from interpreter import DEVICE
from tolerance import three_way
from torch import Tensor, nn
from torch.func import functional_call

import qwen2audio_kernels as kernels
from qwen2audio_core import backends, ops
from qwen2audio_core.cache import KVCache
from qwen2audio_core.frontend import clip_lengths, log_mel
from qwen2audio_core.model import Qwen2Audio, read_mask
from qwen2audio_core.tiny import TINY


@pytest.fixture
def model() -> Qwen2Audio:
    """No parameter keeps its usual start value: a forgotten bias or weight then shows."""
    model = Qwen2Audio(TINY).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.ndim == 1 or "embed" in name else parameter[0].numel() ** -0.5
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            drawn = mean + std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn)
    return model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """ids, mel, conv_frames, attention_mask of two rows: text, a clip, text."""
    time = torch.arange(9000) / 16_000
    waveforms = [torch.sin(2000 * time[:samples] ** 2) * 0.3 for samples in (9000, 5000)]
    lengths = [clip_lengths(len(waveform)) for waveform in waveforms]
    rows = [[5, 6] + [TINY.audio_token_id] * clip.audio_tokens + [9, 8, 7] for clip in lengths]
    longest = max(map(len, rows))
    mels = [log_mel(waveform) for waveform in waveforms]
    frames = max(mel.shape[1] for mel in mels)
    drawn = {
        "ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "mel": torch.stack([nn.functional.pad(m, (0, frames - m.shape[1])) for m in mels]),
        "conv_frames": torch.tensor([clip.conv_frames for clip in lengths]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
    }
    assert drawn["conv_frames"].unique().numel() == 2 and not drawn["attention_mask"].all()
    return {name: tensor.to(DEVICE) for name, tensor in drawn.items()}


class Step(nn.Module):
    """A training step's forward: the loss over the real tokens, and their hidden states."""

    def __init__(self, model: Qwen2Audio, cross_entropy: Callable[..., Tensor]):
        super().__init__()
        self.model, self.cross_entropy = model, cross_entropy

    def forward(
        self, ids: Tensor, mel: Tensor, conv_frames: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = self.model.embed(ids, mel, conv_frames)
        positions, key_start = read_mask(x, attention_mask)
        x = self.model.language_model.model(x, positions, key_start, None)
        labels = ids.masked_fill((attention_mask == 0) | (ids == TINY.audio_token_id), -100)[:, 1:]
        weight = self.model.language_model.lm_head.weight
        loss = self.cross_entropy(x[:, :-1].flatten(0, 1), weight, labels.flatten())
        return loss, x[attention_mask != 0]


def test_every_slot_gets_a_kernel(model: Qwen2Audio) -> None:
    """All but the linear layers: their kernel is for few rows and has no backward."""
    with backends.use(model, "triton") as used:
        assert used.chosen == {op: "torch" if op == "linear" else "triton" for op in backends.PLAIN}
        filled = [
            function
            for module in model.modules()
            for name, function in vars(module).items()
            if name.endswith("_op") and name != "linear_op"
        ]
        assert len(filled) > 20
        assert all(function.__module__.startswith("qwen2audio_kernels.") for function in filled)


def test_forward_and_every_gradient(model: Qwen2Audio, batch: dict[str, Tensor]) -> None:
    parameters = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    trained = tuple(f"model.{name}" for name, p in model.named_parameters() if p.requires_grad)

    def step(every: str, cross_entropy: Callable[..., Tensor]) -> Callable[..., object]:
        def run(**given: Tensor) -> object:
            with backends.use(model, every):
                return functional_call(Step(model, cross_entropy), given, kwargs=batch)

        return run

    found = three_way(
        step("triton", kernels.cross_entropy),
        step("torch", ops.cross_entropy),
        torch.float32,
        parameters,
        gradients=trained,
    )
    assert len(trained) > 60 and set(found) == {"output 0", "output 1", *(f"d{n}" for n in trained)}


def test_decoding_on_a_cache(model: Qwen2Audio, batch: dict[str, Tensor]) -> None:
    def decode(every: str, dtype: torch.dtype) -> Tensor:
        logits = []
        with torch.no_grad(), backends.use(model.to(dtype), every):
            rows, length = batch["ids"].shape
            cache = KVCache(TINY.text, rows, length + 3, DEVICE, dtype)
            logits.append(model(**batch, cache=cache, last_only=True))
            for token in ([11, 12], [13, 14], [15, 16]):
                ids = torch.tensor(token, device=DEVICE)[:, None]
                logits.append(model(ids, cache=cache))
        return torch.cat(logits, dim=1)

    exact = decode("torch", torch.float64)
    plain, ours = decode("torch", torch.float32), decode("triton", torch.float32)
    limit = 2 * (plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= limit
    assert ours.argmax(-1).equal(exact.argmax(-1))


def test_a_wrong_kernel_would_be_noticed(model: Qwen2Audio, batch: dict[str, Tensor]) -> None:
    """One part in a thousand in one op of one layer fails the comparison of the logits."""
    with torch.no_grad():
        plain = model(**batch)

        def off(*arguments: object) -> Tensor:
            return ops.swiglu(*arguments) * 1.001

        with backends.use(model, swiglu=off, layers="language_model.model.layers.1"):
            wrong = model(**batch)
        exact = model.double()(**batch)
    limit = 2 * (plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (wrong - exact).abs().max() > 10 * limit
