"""Waveform to log-mel, and the one place that turns samples into frames into audio tokens.

    samples (16,000/s)  --STFT, hop 160-->       mel frames   (100/s)
                        --conv, stride 2-->      conv frames  (50/s)
                        --avg pool, stride 2-->  audio tokens (25/s, 40 ms each)

The published model pads every clip to 30 s and masks the padding away inside the encoder. Here only
the frames that carry sound are computed. The result is the same: see `log_mel`.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2audio_core.errors import AudioError

SAMPLE_RATE = 16_000  # Hz
N_FFT = 400  # samples in a window, 25 ms
HOP_LENGTH = 160  # samples between windows, 10 ms
MAX_SECONDS = 30
MAX_SAMPLES = MAX_SECONDS * SAMPLE_RATE  # 480,000
MAX_FRAMES = MAX_SAMPLES // HOP_LENGTH  # 3,000 mel frames
PIECE = 750  # frames computed at a time
SECONDS_PER_TOKEN = 4 * HOP_LENGTH / SAMPLE_RATE  # 0.04


class ClipLengths(NamedTuple):
    """How long one clip is at each stage.

    To pool differently change clip_lengths, encoder.forward, model.embed, packed_encoder.py and
    attribution.py together: model and engine refuse clips whose rows are not as many as its places.
    """

    mel_frames: int  # frames whose middle lies in the clip
    conv_frames: int  # frames the encoder's attention sees
    audio_tokens: int  # A, placeholders in the prompt and rows spliced into it
    input_frames: int  # F, mel frames fed to the encoder: those its valid frames can see


def clip_lengths(samples: int) -> ClipLengths:
    """Lengths of a clip of `samples` samples at 16 kHz.

        mel = ceil(N / 160)    conv = ceil(mel / 2)    A = floor(conv / 2)
        input = min(2 conv + 1, 3000)

    Two convolutions of width 3, the second with stride 2, let the last of the conv frames see mel
    frame 2 conv and no later one. A clip of 320 samples (20 ms) or fewer has no audio token.

    errors   AudioError for more than 480,000 samples (30 s)
    """
    if not 0 <= samples <= MAX_SAMPLES:
        raise AudioError(
            f"a clip of {samples} samples ({samples / SAMPLE_RATE:.2f} s) exceeds the model's"
            f" window of {MAX_SECONDS} s: split it first (audio.split)"
        )
    mel_frames = -(-samples // HOP_LENGTH)
    conv_frames = -(-mel_frames // 2)
    input_frames = min(2 * conv_frames + 1, MAX_FRAMES) if conv_frames else 0
    return ClipLengths(mel_frames, conv_frames, conv_frames // 2, input_frames)


@cache
@torch.inference_mode(False)  # what is kept may be needed for a gradient later
def mel_edges(num_mel_bins: int = 128) -> Tensor:
    """(M + 2,) float64 Hz, equally spaced from 0 to 8,000 Hz on Slaney's mel scale.

    The scale is linear below 1,000 Hz; above it 27 steps make a factor of 6.4 (Slaney, Auditory
    Toolbox, 1998). Bin m has its middle at edge m + 1.
    """
    hz_per_mel, break_hz, log_step = 200 / 3, 1000.0, math.log(6.4) / 27
    break_mel = break_hz / hz_per_mel
    top_mel = break_mel + math.log(SAMPLE_RATE / 2 / break_hz) / log_step
    mels = torch.linspace(0, top_mel, num_mel_bins + 2, dtype=torch.float64)
    return torch.where(
        mels < break_mel, mels * hz_per_mel, break_hz * torch.exp(log_step * (mels - break_mel))
    )


@cache
@torch.inference_mode(False)
def mel_filters(num_mel_bins: int = 128) -> Tensor:
    """Triangular filters that sum the power spectrum into mel bins.

    returns  (M, 201) float32; bin m rises from edge m of mel_edges to 1 at edge m + 1 and falls to
             0 at edge m + 2, then is scaled by 2 / (its width in Hz): the same filters as
             librosa.filters.mel(norm="slaney").
    """
    edges = mel_edges(num_mel_bins)
    freqs = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    lower, center, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (freqs - lower) / (center - lower)
    falling = (upper - freqs) / (upper - center)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (upper - lower)).float()


@cache
@torch.inference_mode(False)
def constants(
    num_mel_bins: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
    """The Hann window (400,) and the mel filters, made in float32 as published.

    The filters come in two halves, each the frequencies it hears and a matrix (frequencies, M/2):
    the lower bands hear only the lowest fifth of them, and so half of all products are with zeros.
    """
    window = torch.hann_window(N_FFT, device=device, dtype=torch.float32)
    halves = []
    for bands in mel_filters(num_mel_bins).chunk(2):
        heard = bands.any(0).nonzero()
        frequencies = slice(int(heard.min()), int(heard.max()) + 1)
        halves.append((frequencies, bands[:, frequencies].T.to(device, dtype).contiguous()))
    return window.to(dtype), halves


def log_mel(waveform: Tensor, num_mel_bins: int = 128) -> Tensor:
    """Log-mel spectrogram of one clip, on the waveform's device.

        x = log10(max(mel @ |STFT|^2, 1e-10))       Hann window of 400, hop 160, reflected edges
        y = (max(x, max over the clip of x - 8) + 4) / 4

    waveform  (N,)  float32 in [-1, 1], mono, 16 kHz, N <= 480,000; float64 computes in float64
    returns   (M, input_frames)  the waveform's dtype: the first frames of what the published
              frontend computes for the clip padded to 30 s, up to the last one that the encoder's
              valid frames can see. The one behind may still hold the clip's last 40 samples.
    errors    AudioError for more than 30 s; ValueError for another shape or dtype
    Whisper, arXiv 2212.04356, section 2.2, with the per-clip maximum of its published code.
    """
    if waveform.ndim != 1 or waveform.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"waveform is {tuple(waveform.shape)} of {waveform.dtype},"
            " expected (N,) of float32 or float64"
        )
    lengths = clip_lengths(waveform.shape[0])
    if lengths.input_frames == 0:
        return waveform.new_empty(num_mel_bins, 0)
    # The maximum needs one frame more: its window still reaches the clip's last 40 samples.
    frames = max(lengths.input_frames, lengths.mel_frames + 2)
    half = N_FFT // 2
    if frames < MAX_FRAMES:
        end = (frames - 1) * HOP_LENGTH + half
    else:  # only now does a window reach the end of the 30 s, where the signal is reflected again
        frames, end = MAX_FRAMES, MAX_SAMPLES
    reflected = half if end == MAX_SAMPLES else 0
    padded = F.pad(waveform, (half, end - waveform.shape[0] + reflected))
    padded[:half] = padded[half + 1 : 2 * half + 1].flip(0)
    if reflected:
        padded[-half:] = padded[-2 * half - 1 : -half - 1].flip(0)
    window, halves = constants(num_mel_bins, waveform.device, waveform.dtype)
    windows = padded.unfold(0, N_FFT, HOP_LENGTH)[:frames]  # (frames, 400), a view

    def mel_of(some: Tensor) -> Tensor:
        squares = torch.view_as_real(torch.fft.rfft(some * window)).square_()
        power = squares[..., 0] + squares[..., 1]
        return torch.cat([power[:, heard] @ bands for heard, bands in halves], dim=1)

    # Piece by piece, so that what lies between stays in the processor's cache.
    pieces = [mel_of(piece) for piece in windows.split(PIECE)]
    mel = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # (frames, M)
    lowest = (mel.amax() * 1e-8).clamp(min=1e-10)  # 8 below the maximum, once the log is taken
    log = mel.T[:, : lengths.input_frames].clamp(min=lowest).log10_()
    return log.mul_(0.25).add_(1.0)
