"""Anything that holds sound to a mono waveform at 16 kHz, and that to pieces of at most 30 s.

    file, bytes, URL --audio_files--> blocks --mean of channels, soxr--> waveform --split--> pieces
    array, tensor    ---------------^

Sound passes through in blocks: beside the waveform itself only one block is in memory, however many
channels a file has and whatever its rate.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen2audio_core import audio_files, install
from qwen2audio_core.audio_files import BLOCK_SAMPLES, Blocks
from qwen2audio_core.errors import AudioError, warn
from qwen2audio_core.frontend import MAX_SAMPLES, MAX_SECONDS, SAMPLE_RATE, clip_lengths

MAX_CHANNELS = 64  # of an array; more means that its axes are not channels and samples
MAX_AMPLITUDE = 1e16  # full scale is 1; the power spectrum of anything louder overflows float32
SEARCH_SECONDS = 5  # before each 30 s limit, where `split` looks for silence


class Piece(NamedTuple):
    """Part of a longer waveform."""

    waveform: Tensor  # (N,) at most 480,000 samples
    start: float  # s from the beginning of the whole
    end: float


def load(
    source: Any,
    *,
    sampling_rate: int | None = None,
    resampler: str = "soxr",
    name: str | None = None,
    max_seconds: float | None = None,
) -> Tensor:
    """Read sound from almost anything.

    source         path, http(s), data: or file: URL, bytes, binary file object (read to its end),
                   or samples: NumPy array, tensor or list of floats, of shape (N,) or of two axes.
                   Two axes are ONE clip: the shorter one counts the channels, whichever it is.
                   Integers are PCM and divided by the full range of their type (unsigned ones are
                   centred first); 64-bit integers have no known full scale and are refused
    sampling_rate  Hz, required for samples and refused for everything that states its own
    resampler      "soxr": soxr HQ on the CPU, the same bits as librosa.load(sr=16000).
                   "torchaudio": a windowed sinc in PyTorch; a tensor stays on its device and keeps
                   its gradient; holds the whole clip at its first rate too
    name           what to call the clip in messages
    max_seconds    refuse anything longer, without decoding the rest of it
    returns        (N,) float32, mono (mean of the channels), 16 kHz, N >= 1
    errors         AudioError, one line: not found, not audio, broken, cut short, empty, NaN or
                   infinite samples, longer than max_seconds or 12 hours, too large or too slow a
                   download

    A URL is fetched with this machine's own network rights: do not pass on those of strangers.
    """
    name = name or _name(source)
    if resampler not in ("soxr", "torchaudio"):
        raise AudioError(f"resampler is {resampler!r}, expected 'soxr' or 'torchaudio'")
    if isinstance(source, (Tensor, np.ndarray, list, tuple)):
        rate = _checked_rate(sampling_rate, name)
        if isinstance(source, Tensor) and resampler == "torchaudio":
            return _load_tensor(source, rate, name, max_seconds)
        blocks = _array_blocks(_to_numpy(source, name), rate, name)
        return _assemble(blocks, resampler, name, max_seconds)
    if sampling_rate is not None:
        raise AudioError(
            f"{name}: sampling_rate is for arrays, a file states its own: leave it out"
        )
    with (
        audio_files.open_source(source, name) as file,
        closing(audio_files.decode(file, name)) as blocks,
    ):
        return _assemble(blocks, resampler, name, max_seconds)


def _assemble(blocks: Blocks, resampler: str, name: str, max_seconds: float | None) -> Tensor:
    pcm = bytearray()  # grows in place, where concatenating a list would hold the clip twice
    rate, heard, stream = SAMPLE_RATE, 0, None
    for block_rate, samples in blocks:
        if heard and block_rate != rate:
            raise AudioError(f"{name}: its rate changes from {rate} to {block_rate} Hz midway")
        rate = block_rate
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, with its time
            mono = _to_float(samples, name).mean(axis=1)
        good = np.abs(mono) <= MAX_AMPLITUDE  # False for NaN too
        if not good.all():
            raise _not_finite(name, (heard + int(good.argmin())) / rate)
        heard += len(mono)
        _check_seconds(heard / rate, name, max_seconds)
        if rate != SAMPLE_RATE and resampler == "soxr":
            stream = stream or _soxr_stream(rate)
            mono = stream.resample_chunk(mono)
        pcm += memoryview(mono)  # type: ignore[arg-type]
    if stream:
        pcm += memoryview(stream.resample_chunk(np.empty(0, np.float32), last=True))
        # soxr rounds the length; librosa rounds it up and fills with zeros.
        length = math.ceil(heard * (SAMPLE_RATE / rate))
        pcm += bytes(max(0, 4 * length - len(pcm)))
    if not pcm:
        raise AudioError(f"{name}: holds no samples")
    waveform = torch.frombuffer(pcm, dtype=torch.float32)
    return waveform if rate == SAMPLE_RATE or stream else _resample_torchaudio(waveform, rate)


def _soxr_stream(rate: int) -> Any:
    try:
        import soxr
    except ImportError as error:
        what = f"resampling from {rate} Hz needs soxr"
        raise AudioError(what, install.package("soxr")) from error
    # Fed block by block it gives the same bits as soxr.resample of the whole.
    return soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")


def _resample_torchaudio(waveform: Tensor, rate: int) -> Tensor:
    try:
        from torchaudio.functional import resample
    except Exception as error:  # built for another torch it raises OSError or RuntimeError
        raise AudioError(
            f"resampler='torchaudio' cannot be imported ({audio_files.one_line(error)}):"
            " use 'soxr', or install it in the version of this torch",
            install.extra("torchaudio"),
        ) from error
    # The sharp filter that torchaudio documents as the match of librosa's "kaiser_best".
    return resample(
        waveform,
        rate,
        SAMPLE_RATE,
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser",
        beta=14.769656459379492,
    )


def _check_seconds(seconds: float, name: str, limit: float | None) -> None:
    if limit is not None and seconds > limit:
        raise AudioError(f"{name}: longer than the {limit:g} s allowed here: cut it first")
    audio_files.check_hours(seconds, name)


def _not_finite(name: str, second: float) -> AudioError:
    return AudioError(f"{name}: the sample at {second:.3f} s is NaN, infinite or absurdly large")


def _name(source: Any) -> str:
    samples = isinstance(source, (Tensor, np.ndarray, list, tuple))
    return "audio array" if samples else audio_files.source_name(source)


# Samples


def _checked_rate(rate: Any, name: str) -> int:
    if rate is None:
        raise AudioError(f"{name}: an array does not say its rate: pass sampling_rate in Hz")
    whole = isinstance(rate, (int, np.integer)) and not isinstance(rate, bool)
    if not whole or not 1000 <= rate <= 1_000_000:
        raise AudioError(
            f"{name}: sampling_rate is {rate!r}, expected whole Hz from 1000 to 1000000"
        )
    return int(rate)


def _to_numpy(source: Any, name: str) -> np.ndarray:
    if isinstance(source, Tensor):
        if source.requires_grad:
            raise AudioError(f"{name}: has a gradient: detach it or use resampler='torchaudio'")
        source = source.cpu()
        return (source.float() if source.is_floating_point() else source).numpy()
    try:
        return np.asarray(source)
    except (ValueError, TypeError) as error:
        raise AudioError(
            f"{name}: not numbers of one shape ({audio_files.one_line(error)})"
        ) from error


def _array_blocks(array: np.ndarray, rate: int, name: str) -> Blocks:
    if _channels_first(array.shape, name):
        array = array.T
    array = array.reshape(len(array), -1) if array.size else array.reshape(0, 1)  # (N, channels)
    step = BLOCK_SAMPLES // array.shape[1]
    for start in range(0, len(array), step):
        yield rate, array[start : start + step]


def _channels_first(shape: tuple[int, ...], name: str) -> bool:
    """Whether samples of this shape are (channels, N), not (N,) or (N, channels)."""
    if len(shape) == 1 or (len(shape) == 2 and 0 in shape):
        return False
    if len(shape) != 2 or shape[0] == shape[1] != 1 or min(shape) > MAX_CHANNELS:
        raise AudioError(
            f"{name}: shape {tuple(shape)} is not one clip, expected (N,), (channels, N) or"
            f" (N, channels) with at most {MAX_CHANNELS} channels and N larger than that"
        )
    return shape[0] < shape[1]


def _to_float(samples: np.ndarray, name: str) -> np.ndarray:
    kind, bits = samples.dtype.kind, 8 * samples.dtype.itemsize
    if kind == "f":
        return samples.astype(np.float32, copy=False)
    if kind not in "iu" or bits > 32:
        raise AudioError(
            f"{name}: samples are {samples.dtype}, expected floats or PCM integers of 8 to 32 bits"
        )
    half = 2 ** (bits - 1)
    if kind == "u":
        samples = samples.astype(np.float64) - half
    return samples.astype(np.float32) / np.float32(half)


def _load_tensor(source: Tensor, rate: int, name: str, max_seconds: float | None) -> Tensor:
    if source.is_floating_point():
        waveform = source.float()
    else:
        waveform = torch.from_numpy(_to_float(source.cpu().numpy(), name)).to(source.device)
    channels_first = _channels_first(tuple(waveform.shape), name)
    if not waveform.numel():
        raise AudioError(f"{name}: holds no samples")
    if waveform.ndim == 2:
        waveform = waveform.mean(0 if channels_first else 1)
    bad = ~(waveform.detach().abs() <= MAX_AMPLITUDE)
    if bad.any():
        raise _not_finite(name, int(bad.nonzero()[0]) / rate)
    _check_seconds(len(waveform) / rate, name, max_seconds)
    return waveform if rate == SAMPLE_RATE else _resample_torchaudio(waveform, rate)


# Long audio


def split(
    waveform: Tensor,
    long: Literal["split", "error", "cut"] = "split",
    *,
    name: str = "clip",
    notice: Callable[[str], None] | None = None,
) -> list[Piece]:
    """Make pieces that the model can hear, each of 321 to 480,000 samples (20 ms to 30 s).

    waveform  (N,) at 16 kHz; the pieces are views of it
    long      what to do beyond 30 s. "split": cut in the middle of the quietest 30 ms among the
              last 5 s before each limit (the latest of equals); joined, they are the waveform.
              "cut": keep the first 30 s. "error": raise
    name      what to call the clip in messages
    notice    called with one line if there is more than 30 s; without it Python's warnings say it
    errors    AudioError for fewer than 321 samples, which make no audio token; for long="error"
    """
    if long not in ("split", "error", "cut"):
        raise AudioError(f"long is {long!r}, expected 'split', 'error' or 'cut'")
    if waveform.ndim != 1:
        raise AudioError(f"{name}: shape {tuple(waveform.shape)}, expected one mono waveform (N,)")
    total, seconds = len(waveform), len(waveform) / SAMPLE_RATE
    if total <= MAX_SAMPLES:
        if not clip_lengths(total).audio_tokens:
            raise AudioError(
                f"{name}: too short to be heard, {1000 * seconds:.3g} ms: the model needs more than"
                " 20 ms, give a longer clip"
            )
        return [Piece(waveform, 0.0, seconds)]
    too_long = f"{name} is {seconds:.1f} s long"
    if long == "error":
        raise AudioError(
            f"{too_long}, the model hears {MAX_SECONDS} s at once: ask for it long 'split' or 'cut'"
        )
    if long == "split":
        bounds = [0, *_cuts(waveform), total]
        places = ", ".join(f"{cut / SAMPLE_RATE:.1f} s" for cut in bounds[1:-1])
        message = f"{too_long}: split into {len(bounds) - 1} pieces at {places}"
    else:
        bounds = [0, MAX_SAMPLES]
        message = f"{too_long}: only its first {MAX_SECONDS} s are used"
    (notice or warn)(message)
    return [
        Piece(waveform[start:end], start / SAMPLE_RATE, end / SAMPLE_RATE)
        for start, end in itertools.pairwise(bounds)
    ]


def _cuts(waveform: Tensor) -> Iterator[int]:
    start, total = 0, len(waveform)
    window, hop = 3 * SAMPLE_RATE // 100, SAMPLE_RATE // 100  # 30 ms, every 10 ms
    while total - start > MAX_SAMPLES:
        # A cut lies 15 ms before the end of its window: these 10 ms more leave an audible rest.
        latest = min(start + MAX_SAMPLES, total - hop)
        earliest = latest - SEARCH_SECONDS * SAMPLE_RATE
        frames = waveform[earliest:latest].detach().cpu().double().unfold(0, window, hop)
        energy = frames.pow(2).sum(-1).flip(0).numpy()  # argmin takes the first of equals
        frame = len(energy) - 1 - int(energy.argmin())
        start = earliest + frame * hop + window // 2
        yield start
