"""The tiny model's data, its audio side: speech, sounds and the rendering of clip descriptions."""

import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from tiny_data import render, sounds, speech

WORDS = {
    "en": "red book",
    "zh": "hong2 shu1",
    "yue": "紅色",
    "fr": "livre rouge",
    "it": "libro rosso",
    "es": "libro rojo",
    "de": "rotes Buch",
    "ja": "あかい",
}
needs_engines = pytest.mark.skipif(
    not (find_library("espeak-ng") and find_library("flite")),
    reason="needs the libraries of espeak-ng and flite (apt install espeak-ng flite)",
)


def test_splits_share_no_voice_and_no_variant() -> None:
    train = {voice.variant for lang in WORDS for voice in speech.voices(lang, "train")}
    test = {voice.variant for lang in WORDS for voice in speech.voices(lang, "test")}
    assert train & test == {""}  # flite's, which have no variants
    assert len(test - {""}) >= 15
    for lang in WORDS:
        keys = [voice.key for split in ("train", "test") for voice in speech.voices(lang, split)]
        assert len({tuple(key) for key in keys}) == len(keys)
        for voice in speech.voices(lang, "test"):
            assert speech.voice(*voice.key) == voice
        assert {voice.gender for voice in speech.voices(lang, "test")} >= {"man", "woman"}
    assert {voice.name for voice in speech.voices("en", "test") if voice.engine == "flite"} == {
        "slt"
    }


@needs_engines
def test_speech_does_not_depend_on_what_was_spoken_before() -> None:
    trembling = speech.voice("espeak", "en-us", "croak")
    breath = speech.voice("flite", "awb", "")
    first = [speech.speak("seven red books", voice) for voice in (trembling, breath)]
    speech.speak("etwas anderes", speech.voice("espeak", "de", "whisper"))
    again = [speech.speak("seven red books", voice) for voice in (trembling, breath)]
    for a, b in zip(first, again, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


@needs_engines
def test_the_level_is_the_asked_one_and_nothing_clips() -> None:
    clip = {"kind": "speech", "text": "two red books", "voice": ["espeak", "en-us", "f3"]}
    for gain_db in (-3, -20):
        peak = np.abs(render.render({**clip, "gain_db": gain_db}, 0)).max()
        assert 20 * np.log10(peak) == pytest.approx(gain_db, abs=0.01)
    loud = {**clip, "gain_db": 0, "noise": {"kind": "white", "snr_db": 0}}
    both = render.render({"kind": "mixture", "parts": [loud, loud]}, 0)
    assert np.abs(both).max() <= 1


@pytest.mark.parametrize("kind", sounds.NOISES)
def test_noise_has_unit_level(kind: str) -> None:
    waveform = sounds.noise(np.random.default_rng(0), kind, 1.5)
    assert waveform.shape == (24_000,)
    assert np.sqrt(np.square(waveform).mean()) == pytest.approx(1)
