"""Sounds, melodies and noises by formula, for the tiny model's data."""

import numpy as np

RATE = 16_000
NOISES = ("white", "pink", "brown", "hum")


def noise(rng: np.random.Generator, kind: str, seconds: float) -> np.ndarray:
    """Steady noise with unit RMS: (seconds * 16000,).

    white: equal power per hertz; pink: falls by 3 dB an octave; brown: by 6 dB; hum: mains, 50 or
    60 Hz with its harmonics. Power below 20 Hz is left out.
    """
    length = max(1, round(seconds * RATE))
    if kind == "white":
        waveform = rng.standard_normal(length)
    elif kind in ("pink", "brown"):
        size = 1 << (length - 1).bit_length()
        hertz = np.arange(size // 2 + 1) * RATE / size
        slope = np.where(hertz < 20, 0.0, np.maximum(hertz, 20) ** (-0.5 if kind == "pink" else -1))
        spectrum = slope * (rng.standard_normal(len(hertz)) + 1j * rng.standard_normal(len(hertz)))
        waveform = np.fft.irfft(spectrum, size)[:length]
    elif kind == "hum":
        time = np.arange(length) / RATE
        waveform = np.zeros(length)
        base = rng.choice((50.0, 60.0))
        for harmonic in range(1, 9):
            phase = rng.uniform(0, 2 * np.pi)
            level = rng.uniform(0.3, 1.0) / harmonic
            waveform += level * np.sin(2 * np.pi * base * harmonic * time + phase)
    else:
        raise ValueError(f"noise {kind!r}: it is one of {', '.join(NOISES)}")
    return waveform / max(np.sqrt(np.square(waveform).mean()), 1e-9)
