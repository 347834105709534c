"""A clip's description (plain JSON values) to its waveform, for the small model's data.

    {"kind": "speech", "text": "...", "voice": ["espeak", "en-us", "f3"], "rate": 160, "pitch": 50,
     "spoken": "..."}                      what the engine is given, where that is not the text
    {"kind": "sound", "name": "siren", "seconds": 2.0}            a name of sounds.SOUNDS
    {"kind": "melody", "direction": "rising", "tempo": "fast", "timbre": "flute"}
    {"kind": "noise", "name": "white", "seconds": 2.0}            a name of sounds.NOISES
    {"kind": "silence", "seconds": 2.0}
    {"kind": "sequence", "parts": [clip, ...], "gap": 0.3}        one after the other
    {"kind": "mixture", "parts": [clip, ...]}                     together, each from its own "at"

Every kind also takes, in the order they are applied:

    "reverb": 0 to 1        a room, from a small one to a hall
    "gain_db": -3           the PEAK of the signal, dB below full scale (a sequence or mixture
                            without it keeps its parts' levels; all else has -3)
    "at", "pad": seconds    silence before and after
    "noise": {"kind": "white", "snr_db": 20}     under all of it; the signal's level is the RMS over
                            its 20 ms frames within 40 dB of the loudest. "level_db" in place of
                            "snr_db" gives the noise's own RMS below full scale (for silence)
    "sample_rate": 8000     the clip passes through that rate, which takes away what is above half

Only at the very end, if noise or a sum went beyond full scale, the whole clip is scaled down:
nothing clips, and parts of one clip keep their level differences.
"""

import numpy as np
import soxr

from tiny_data import sounds, speech

RATE = speech.RATE
KINDS = ("speech", "sound", "melody", "noise", "silence", "sequence", "mixture")


def render(clip: dict, seed: int) -> np.ndarray:
    """The clip's waveform: (N,) float32 at 16 kHz within [-1, 1]. Equal arguments, equal samples.

    Raises ValueError for a description that makes no sense, speech.SpeechError where an engine
    is missing.
    """
    return _finish(_render(clip, np.random.default_rng(seed)))


def render_with_sounds(clip: dict, seed: int) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """render's waveform, and which speech sound begins when (speech.speak_with_sounds).

    The list is empty for what espeak-ng does not speak as one utterance.
    """
    if clip["kind"] != "speech" or clip["voice"][0] != "espeak":
        return render(clip, seed), []
    text = clip.get("spoken") or clip["text"]
    spoken, heard = speech.speak_with_sounds(
        text, speech.voice(*clip["voice"]), clip.get("rate", 160), clip.get("pitch", 50)
    )
    at = clip.get("at", 0.0)
    waveform = _finish(_render(clip, np.random.default_rng(seed), spoken))
    return waveform, [(name, round(start + at, 3)) for name, start in heard]


def _finish(waveform: np.ndarray) -> np.ndarray:
    peak = np.abs(waveform).max(initial=0.0)
    return (waveform / max(1.0, peak)).astype(np.float32)


def _render(clip: dict, rng: np.random.Generator, spoken: np.ndarray | None = None) -> np.ndarray:
    """`spoken` is the speech of the clip where it is known already."""
    kind = clip["kind"]
    if kind not in KINDS:
        raise ValueError(f"clip kind {kind!r}: it is one of {', '.join(KINDS)}")
    waveform = _source(clip, kind, rng) if spoken is None else spoken
    if clip.get("reverb"):
        waveform = reverberate(waveform, clip["reverb"], rng)
    gain_db = clip.get("gain_db", None if kind in ("sequence", "mixture") else -3.0)
    peak = np.abs(waveform).max(initial=0.0)
    if gain_db is not None and peak > 0:
        waveform = waveform * (10 ** (gain_db / 20) / peak)
    level = active_rms(waveform)
    waveform = np.pad(waveform, (samples(clip.get("at", 0.0)), samples(clip.get("pad", 0.0))))
    if clip.get("noise"):
        waveform = waveform + _noise(clip["noise"], level, len(waveform), rng)
    rate = clip.get("sample_rate")
    if rate and rate < RATE:
        low = soxr.resample(waveform, RATE, rate, quality="HQ")
        high = soxr.resample(low, rate, RATE, quality="HQ")[: len(waveform)]
        waveform = np.pad(high, (0, len(waveform) - len(high)))
    return waveform


def _source(clip: dict, kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "speech":
        voice = speech.voice(*clip["voice"])
        text = clip.get("spoken") or clip["text"]
        return speech.speak(text, voice, clip.get("rate", 160), clip.get("pitch", 50))
    if kind == "sound":
        return sounds.sound(clip["name"], rng, clip.get("seconds", 2.0))
    if kind == "melody":
        return sounds.melody(rng, clip["direction"], clip["tempo"], clip["timbre"])
    if kind == "noise":
        return sounds.noise(rng, clip.get("name", "white"), clip["seconds"])
    if kind == "silence":
        return np.zeros(samples(clip["seconds"]))
    parts = [
        _render(part, child)
        for part, child in zip(clip["parts"], rng.spawn(len(clip["parts"])), strict=True)
    ]
    if kind == "sequence":
        gap = np.zeros(samples(clip.get("gap", 0.3)))
        return np.concatenate([piece for part in parts for piece in (part, gap)][:-1])
    length = max(len(part) for part in parts)
    return np.sum([np.pad(part, (0, length - len(part))) for part in parts], axis=0)


def samples(seconds: float) -> int:
    return round(seconds * RATE)


def active_rms(waveform: np.ndarray) -> float:
    """RMS over the 20 ms frames within 40 dB of the loudest one; 0 for silence."""
    frame = RATE // 50
    padded = np.pad(waveform, (0, -len(waveform) % frame))
    power = np.square(padded.reshape(-1, frame)).mean(axis=1)
    if not len(power) or power.max() == 0:
        return 0.0
    return float(np.sqrt(power[power > power.max() * 1e-4].mean()))


def _noise(about: dict, level: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of the asked level: by "level_db", or "snr_db" below the signal's active level."""
    if "level_db" in about:
        wanted = 10 ** (about["level_db"] / 20)
    else:
        wanted = level * 10 ** (-about["snr_db"] / 20)
    waveform = sounds.noise(rng, about["kind"], length / RATE)
    return waveform * (wanted / max(np.sqrt(np.square(waveform).mean()), 1e-9))


def reverberate(waveform: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Add a room: noise that has decayed by 60 dB after 0.15 s (amount 0) to 1 s (amount 1).

    The direct sound stays where it is; the answer is longer by half the decay time.
    """
    decay = 0.15 + 0.85 * amount
    time = np.arange(1, round(decay * RATE)) / RATE
    tail = rng.standard_normal(len(time), dtype=np.float32) * 10 ** (-3 * time / decay)
    tail *= np.sqrt((0.1 + 0.9 * amount) / np.square(tail).sum())  # energy, the direct sound has 1
    impulse = np.concatenate([[1.0], tail]).astype(np.float32)
    length = len(waveform) + len(impulse) // 2
    size = sounds.fast_size(len(waveform) + len(impulse))
    spectrum = np.fft.rfft(waveform.astype(np.float32), size) * np.fft.rfft(impulse, size)
    return np.fft.irfft(spectrum, size)[:length]
