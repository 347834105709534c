"""The log-mel kernels against the plain frontend."""

from functools import partial

import pytest
import torch
from interpreter import DEVICE
from tolerance import three_way
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_core import frontend


def noise(samples: int, seed: int = 0) -> Tensor:
    """Noise that fades by 80 dB, so that the clamp 8 decades below the maximum matters."""
    drawn = torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1
    return (drawn * torch.logspace(0, -4, samples)).to(DEVICE)


def speechlike(samples: int) -> Tensor:
    time = torch.arange(samples) / 16_000
    tones = sum(torch.sin(6.2831853 * 140 * k * time) / k for k in range(1, 25))
    return (0.1 * tones * (0.6 + 0.4 * torch.sin(6.2831853 * 4 * time))).to(DEVICE)


def check(waveform: Tensor, mels: int = 128) -> None:
    ours, plain = kernels.log_mel(waveform, mels), frontend.log_mel(waveform, mels)
    assert (ours - plain).abs().max() <= 2e-5  # the published one is 1e-5 from its float64
    three_way(
        partial(kernels.log_mel, num_mel_bins=mels),
        partial(frontend.log_mel, num_mel_bins=mels),
        torch.float32,
        {"waveform": waveform},
        gradients=(),
    )


@pytest.mark.parametrize("samples", [1, 39, 160, 161, 319, 320, 321, 1599, 16_000, 16_041])
def test_short_clips(samples: int) -> None:
    check(noise(samples))


@pytest.mark.parametrize("samples", [479_519, 480_000])
def test_the_end_of_the_window_of_30_s(samples: int) -> None:
    # From here on the reflection at 30 s is heard, and the frames end with the window.
    waveform = noise(samples)
    waveform[-400:] = noise(400, seed=1)
    check(waveform)


def test_tones() -> None:
    check(speechlike(24_000))


@pytest.mark.parametrize("mels", [80, 1])
def test_other_filters(mels: int) -> None:
    check(noise(5000), mels)


def test_silence_and_a_click_at_the_end() -> None:
    check(torch.zeros(800, device=DEVICE))
    click = torch.zeros(1620, device=DEVICE)
    click[-5:] = 1.0  # the frame behind the last one returned holds the maximum
    assert (kernels.log_mel(click) - frontend.log_mel(click)).abs().max() <= 2e-5


def test_strided_and_empty_clips() -> None:
    both = torch.stack((noise(3000), noise(3000, seed=1)), dim=1)
    assert torch.equal(kernels.log_mel(both[:, 1]), kernels.log_mel(both[:, 1].contiguous()))
    assert kernels.log_mel(both[:0, 0]).shape == (128, 0)


@pytest.mark.parametrize("mels", [1, 80, 128])
def test_filters_are_the_frontends(mels: int) -> None:
    from qwen2audio_kernels.log_mel import _filters

    ours = _filters(mels, torch.device("cpu")).t()
    assert not ours[:, 201:].any()
    torch.testing.assert_close(ours[:, :201], frontend.mel_filters(mels), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shift", [1, -1])
def test_the_check_notices_one_sample(shift: int) -> None:
    with pytest.raises(AssertionError):
        three_way(
            lambda waveform: kernels.log_mel(waveform.roll(shift)),
            frontend.log_mel,
            torch.float32,
            {"waveform": noise(5000)},
            gradients=(),
        )


def test_errors() -> None:
    calls = {
        "expected \\(N,\\) of float32": lambda: kernels.log_mel(noise(400)[None]),
        "480001 samples": lambda: kernels.log_mel(torch.zeros(480_001, device=DEVICE)),
        "float64": lambda: kernels.log_mel(noise(400).double()),
        "0 mel bins": lambda: kernels.log_mel(noise(400), 0),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
