"""Make the example clips that ship with the package: short speech in eight languages, and sounds.

    python scripts/make_clips.py                      writes into qwen2audio_core/assets/clips
    python scripts/make_clips.py --out DIR            writes into DIR

Speech comes from espeak-ng, which must be installed; sounds are formulas. Every clip is
16-bit FLAC, mono, 16 kHz. clips.json lists them with their transcript or description.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import soundfile

from qwen2audio_core import audio

RATE = 16_000
PEAK = 0.7
CLIPS = Path(__file__).resolve().parents[1] / "qwen2audio_core" / "assets" / "clips"

# file name, espeak-ng voice, language tag of the model, transcript, what espeak-ng is given if not
# that: it reads Chinese characters aloud with English numbers for their tones, but knows pinyin
SPEECH = (
    ("en_capital", "en-us", "en", "What is the capital of France?", None),
    ("en_train", "en-gb", "en", "The train to London leaves at seven in the morning.", None),
    ("en_snow", "en-us", "en", "What colour is snow?", None),
    ("zh_weather", "cmn-latn-pinyin", "zh", "今天天气怎么样？", "jin1tian1 tian1qi4 zen3me5yang4?"),  # noqa: RUF001
    ("yue_tea", "yue", "yue", "我想饮一杯茶。", None),
    ("ja_station", "ja", "ja", "駅はどこですか。", "えきはどこですか。"),
    ("de_coffee", "de", "de", "Ich hätte gern eine Tasse Kaffee.", None),
    ("fr_book", "fr-fr", "fr", "Le petit livre rouge est sur la table.", None),
    ("es_library", "es", "es", "¿Dónde está la biblioteca?", None),
    ("it_sea", "it", "it", "Domani andiamo al mare.", None),
)


def speech(voice: str, text: str) -> np.ndarray:
    """Speak `text`, trim the silence around it to 0.1 s: (N,) float32 at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "-s", "130", "--stdout", text]
    wav = subprocess.run(command, check=True, capture_output=True).stdout
    waveform = audio.load(wav).numpy()
    loud = np.flatnonzero(np.abs(waveform) > 0.01)
    edge = RATE // 10
    return waveform[max(0, loud[0] - edge) : loud[-1] + edge]


def siren(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two-tone horn, 440 and 585 Hz, half a second each."""
    hertz = np.where(time % 1.0 < 0.5, 440.0, 585.0)
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    return np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.2 * np.sin(3 * phase)


def bell(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A struck bell: partials at the ratios of a church bell, the higher the faster they fade."""
    ratios = (0.5, 1.0, 1.183, 1.506, 2.0, 2.514, 2.662, 3.011, 4.166)
    tones = [
        np.exp(-time * (1 + ratio)) * np.sin(2 * np.pi * 520 * ratio * time) / ratio
        for ratio in ratios
    ]
    return np.sum(tones, axis=0)


def rain(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bright hiss and three hundred drops of all pitches, each gone within some milliseconds."""
    waves = 0.15 * np.diff(rng.standard_normal(len(time) + 1))
    since = np.arange(80) / RATE
    for start in rng.integers(0, len(time) - len(since), size=300):
        drop = np.exp(-since / 0.001) * np.sin(2 * np.pi * rng.uniform(1800, 5500) * since)
        waves[start : start + len(since)] += rng.exponential(0.3) * drop
    return waves


def knock(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Three knocks on wood: low resonances and a little noise, gone within a tenth of a second."""
    waves = np.zeros(len(time))
    for start in (0.2, 0.55, 0.9):
        since = time - start
        struck = np.where(since >= 0, np.exp(-since.clip(0) * 45), 0.0)
        ring = np.sin(2 * np.pi * 180 * since) + 0.6 * np.sin(2 * np.pi * 410 * since)
        waves += struck * (ring + 0.3 * rng.standard_normal(len(time)))
    return waves


def melody(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The first notes of "Twinkle, Twinkle, Little Star" on a plucked string."""
    waves = np.zeros(len(time))
    for i, semitones in enumerate((0, 0, 7, 7, 9, 9, 7)):
        since = time - 0.4 * i
        hertz = 261.63 * 2 ** (semitones / 12)
        for harmonic in range(1, 6):
            fade = np.where(since >= 0, np.exp(-since.clip(0) * 3 * harmonic), 0.0)
            waves += fade * np.sin(2 * np.pi * hertz * harmonic * since) / harmonic
    return waves


SOUNDS = (  # function, seconds, description
    (siren, 2.0, "A two-tone emergency siren."),
    (bell, 2.5, "A bell is struck once and rings."),
    (rain, 2.5, "Rain is falling."),
    (knock, 1.5, "Three knocks on a wooden door."),
    (melody, 3.4, 'The first notes of "Twinkle, Twinkle, Little Star" on a plucked string.'),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CLIPS, metavar="DIR")
    out = parser.parse_args(argv).out
    if shutil.which("espeak-ng") is None:
        parser.error("espeak-ng is not installed (Debian and Ubuntu: apt install espeak-ng)")
    out.mkdir(parents=True, exist_ok=True)
    entries = []

    def write(name: str, waveform: np.ndarray, **about: str) -> None:
        path = out / f"{name}.flac"
        waveform = PEAK * waveform / np.abs(waveform).max()
        soundfile.write(path, waveform, RATE, subtype="PCM_16")
        entries.append({"file": path.name, "seconds": round(len(waveform) / RATE, 2), **about})
        print(f"{path.name:20} {len(waveform) / RATE:5.2f} s {path.stat().st_size:7} bytes")

    for name, voice, language, text, spoken in SPEECH:
        write(
            name, speech(voice, spoken or text), kind="speech", language=language, transcript=text
        )
    for i, (sound, seconds, description) in enumerate(SOUNDS):
        time = np.arange(int(seconds * RATE)) / RATE
        waveform = sound(time, np.random.default_rng(i))
        write(f"sound_{sound.__name__}", waveform, kind="sound", description=description)
    manifest = json.dumps(entries, ensure_ascii=False, indent=2)
    (out / "clips.json").write_text(manifest + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
