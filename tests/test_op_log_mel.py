"""The log-mel kernels against the plain frontend."""

import math
from collections.abc import Callable

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


def check(
    waveform: Tensor, mels: int = 128, kernel: Callable[..., Tensor] = kernels.log_mel
) -> None:
    """The three-way rule, with each bin's error in units of what float32 can hold there.

    A float32 transform is some 1e-7 of the frame's amplitude off in every bin, so the logarithm of
    a bin that is r times weaker than the loudest one is r times that off, by any algorithm. In a
    clip of noise some bin is weak by chance, and two good frontends differ by 3e-5 there.
    """
    exact = frontend.log_mel(waveform.double(), mels)
    times_weaker = 10 ** (2 * (exact.amax(0) - exact))  # in amplitude; y is log10(power) / 4
    unit = 1 + times_weaker / (2 * math.log(10))
    three_way(
        lambda waveform: kernel(waveform, mels) / unit,
        lambda waveform: frontend.log_mel(waveform, mels) / unit,
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
    with pytest.raises(AssertionError, match="largest error"):
        check(
            noise(5000), kernel=lambda waveform, mels: kernels.log_mel(waveform.roll(shift), mels)
        )


def test_the_check_notices_short_numbers() -> None:
    """As if the products were made in TF32, which keeps 10 bits of each factor."""

    def ten_bits(x: Tensor) -> Tensor:
        return (x.contiguous().view(torch.int32) + 4096 & -8192).view(torch.float32)

    for clip in (noise(5000), speechlike(5000)):
        with pytest.raises(AssertionError, match="largest error"):
            check(clip, kernel=lambda clip, mels: kernels.log_mel(ten_bits(clip), mels))


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
