"""Log-mel spectrogram of one clip, at its true length.

    re = even @ (window * cos)      even = frame[n] + frame[400 - n]      n = 1 .. 200
    im = odd  @ (window * sin)      odd  = frame[n] - frame[400 - n]      201 frequencies
    mel = (re^2 + im^2) @ filters (201, M)
    x   = log10(max(mel, 1e-10)) / 4 + 1;   y = max(x, max over the clip of x - 2)

The Fourier transform of 400 samples is a matrix product. Its cosines are equal for n and 400 - n,
its sines differ in sign and the window is symmetric, so a frame is folded first: half the work and
less rounding. That is still ten times the operations of a fast transform, but everything from the
samples to x stays in one program. The maximum over the clip needs all of it, so a second kernel
clamps.

Roofline  launches: 30 s are 0.3 G multiply-adds and 3.5 MB, some 10 microseconds, and two launches.
Layout    one program per BLOCK_F frames; samples are gathered from the waveform, with the
          reflection at its edges, and frames, which overlap, are never written out.
Rounding  everything in float32 without TF32; tables made in float64 from the float32 window, once
          per device. The transform is 1e-7 of the frame's amplitude from its float64, as a fast
          one is. In y that is 1e-7 too, except in bins far below the frame's loudest one, where the
          logarithm magnifies it in every float32 frontend: up to 2e-5 in the tests' clips.
Limits    float32, no backward, 30 s.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch

SAMPLE_RATE = 16_000  # Hz
N_FFT = 400  # samples in a window
HOP_LENGTH = 160  # samples between windows
MAX_SAMPLES = 30 * SAMPLE_RATE
MAX_FRAMES = MAX_SAMPLES // HOP_LENGTH
FREQUENCIES = 256  # the 201 of the transform, padded with zeros to whole tiles
FOLDED = 208  # samples 0 to 200 of a folded window, padded with zeros


@triton.jit
def _samples(waveform_ptr, position, samples, MAX_SAMPLES):
    """The clip, silent from its end to 30 s and reflected at both ends of them."""
    position = tl.abs(position)
    position = tl.minimum(position, 2 * (MAX_SAMPLES - 1) - position)
    return tl.load(waveform_ptr + position, mask=position < samples, other=0.0)


@triton.jit
def log_mel_fwd_kernel(
    waveform_ptr,  # (N,)
    cos_ptr, sin_ptr,  # (208, 256)
    filters_ptr,  # (256, M)
    x_ptr,  # (M, frames)
    maxima_ptr,  # (programs,)
    samples, frames, mels, MAX_SAMPLES, HOP: tl.constexpr, WINDOW: tl.constexpr,
    FOLDED: tl.constexpr, FREQUENCIES: tl.constexpr, BLOCK_MEL: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    mel_bins = tl.arange(0, BLOCK_MEL)
    mel = tl.zeros((BLOCK_F, BLOCK_MEL), tl.float32)
    for first in range(0, FREQUENCIES, BLOCK_Q):
        frequency = first + tl.arange(0, BLOCK_Q)
        re = tl.zeros((BLOCK_F, BLOCK_Q), tl.float32)
        im = tl.zeros((BLOCK_F, BLOCK_Q), tl.float32)
        for sample in range(0, FOLDED, BLOCK_N):
            n = sample + tl.arange(0, BLOCK_N)
            start = frame[:, None] * HOP - WINDOW // 2
            left = _samples(waveform_ptr, start + n[None, :], samples, MAX_SAMPLES)
            right = _samples(waveform_ptr, start + WINDOW - n[None, :], samples, MAX_SAMPLES)
            table = n[:, None] * FREQUENCIES + frequency[None, :]
            cos = tl.load(cos_ptr + table, mask=(n < FOLDED)[:, None], other=0.0)
            sin = tl.load(sin_ptr + table, mask=(n < FOLDED)[:, None], other=0.0)
            re = tl.dot(left + right, cos, re, input_precision="ieee")
            im = tl.dot(left - right, sin, im, input_precision="ieee")
        filters = tl.load(
            filters_ptr + frequency[:, None] * mels + mel_bins[None, :],
            mask=(mel_bins < mels)[None, :],
            other=0.0,
        )
        mel = tl.dot(re * re + im * im, filters, mel, input_precision="ieee")
    # 1 / (4 ln 10) and no log2: float32 holds this number twice as well as it holds log10(2).
    x = tl.log(tl.maximum(mel, 1e-10)) * 0.10857362047581294 + 1.0
    inside = (frame < frames)[:, None] & (mel_bins < mels)[None, :]
    tl.store(x_ptr + mel_bins[None, :] * frames + frame[:, None], x, mask=inside)
    tl.store(maxima_ptr + tl.program_id(0), tl.max(tl.where(inside, x, -1.5)))


@triton.jit
def log_mel_clamp_kernel(
    x_ptr,  # (M, frames)
    maxima_ptr,  # (programs,)
    y_ptr,  # (M, length)
    programs, frames, length, elements, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.arange(0, BLOCK_P)
    top = tl.max(tl.load(maxima_ptr + program, mask=program < programs, other=-1.5))
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    x = tl.load(x_ptr + index // length * frames + index % length, mask=inside, other=0.0)
    tl.store(y_ptr + index, tl.maximum(x, top - 2.0), mask=inside)


@cache
def _fourier(device: torch.device) -> tuple[Tensor, Tensor]:
    """Windowed cosines and sines, (208, 256) float32; zeros beyond sample 200 and frequency 200."""
    n, frequency = torch.arange(FOLDED)[:, None], torch.arange(FREQUENCIES)
    angle = 2 * math.pi / N_FFT * (n * frequency % N_FFT).double()
    window = torch.hann_window(N_FFT).double()[:FOLDED, None]
    window = window * ((n <= N_FFT // 2) & (frequency <= N_FFT // 2))
    window[N_FFT // 2] /= 2  # the middle sample is its own mirror image
    cos, sin = window * angle.cos(), window * angle.sin()
    return cos.float().to(device), sin.float().to(device)


@cache
def _filters(mels: int, device: torch.device) -> Tensor:
    """Slaney's mel filters, (256, M) float32, zeros beyond frequency 200.

    The M + 2 edges are equally spaced in mel from 0 to 8,000 Hz: 200 / 3 Hz a mel up to 1,000 Hz,
    from there 27 mel for every factor of 6.4. Filter m is a triangle of area 1 on edges m to m + 2.
    """
    top = 15 + 27 * math.log(8, 6.4)  # mel at 8,000 Hz
    mel = torch.linspace(0, top, mels + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    hertz = torch.arange(FREQUENCIES, dtype=torch.float64)[:, None] * SAMPLE_RATE / N_FFT
    triangles = torch.minimum((hertz - low) / (peak - low), (high - hertz) / (high - peak))
    return (triangles.clamp(min=0) * 2 / (high - low)).float().to(device)


def log_mel(waveform: Tensor, num_mel_bins: int = 128) -> Tensor:
    """Log-mel spectrogram of one clip.

    x = log10(max(mel @ |STFT|^2, 1e-10))       Hann window of 400, hop 160, reflected edges
    y = (max(x, max over the clip of x - 8) + 4) / 4

    waveform  (N,)  float32 in [-1, 1], mono, 16 kHz, N <= 480,000
    returns   (M, min(2 F + 1, 3000))  float32, F = ceil(ceil(N / 160) / 2): the frames that the
              encoder's valid frames can see; (M, 0) for an empty clip
    raises    ValueError for other dtypes, shapes or devices, longer clips, more than 256 mel bins
    Whisper, arXiv 2212.04356, section 2.2, with the per-clip maximum of its published code.
    """
    op = "log_mel"
    shape = f"waveform is {tuple(waveform.shape)} {waveform.dtype}, expected (N,) of float32"
    _launch.check(waveform.ndim == 1 and waveform.dtype == torch.float32, op, shape)
    N = len(waveform)
    _launch.check(N <= MAX_SAMPLES, op, f"{N} samples; the model's window is {MAX_SAMPLES} (30 s)")
    _launch.check(0 < num_mel_bins <= 256, op, f"{num_mel_bins} mel bins, expected 1 to 256")
    _launch.check_device(op, waveform=waveform)
    if N == 0:
        return waveform.new_empty(num_mel_bins, 0)
    mel_frames = triton.cdiv(N, HOP_LENGTH)
    length = min(2 * triton.cdiv(mel_frames, 2) + 1, MAX_FRAMES)
    # The maximum needs one frame more: its window still reaches the clip's last 40 samples.
    frames = min(max(length, mel_frames + 2), MAX_FRAMES)
    device, options = waveform.device, _launch.settings(op, _launch.arch(waveform.device))
    programs = triton.cdiv(frames, options["BLOCK_F"])
    x = torch.empty(num_mel_bins, frames, dtype=torch.float32, device=device)
    maxima = torch.empty(programs, dtype=torch.float32, device=device)
    y = torch.empty(num_mel_bins, length, dtype=torch.float32, device=device)
    block = max(16, triton.next_power_of_2(num_mel_bins))
    _launch.launch(
        log_mel_fwd_kernel, (programs,),
        waveform.contiguous(), *_fourier(device), _filters(num_mel_bins, device), x, maxima,
        N, frames, num_mel_bins, MAX_SAMPLES, HOP=HOP_LENGTH, WINDOW=N_FFT,
        FOLDED=FOLDED, FREQUENCIES=FREQUENCIES, BLOCK_MEL=block, **options,
    )  # fmt: skip
    most = triton.next_power_of_2(triton.cdiv(MAX_FRAMES, options["BLOCK_F"]))
    _launch.launch(
        log_mel_clamp_kernel, (triton.cdiv(y.numel(), 1024),),
        x, maxima, y, programs, frames, length, y.numel(), BLOCK_P=most, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return y
