"""The small model's data, its audio side: speech, sounds and the rendering of clip descriptions."""

import os
import random
import shutil
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest

from qwen2audio_core import frontend

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

pytest.importorskip("soxr")

import make_tiny_data

from tiny_data import render, sounds, speech

RATE = speech.RATE
WORDS = {
    "en": "red book",
    "zh": "hong2 shu1",
    "yue": "紅色",
    "fr": "87 97",  # the numbers that its accents tell apart
    "it": "libro rosso",
    "es": "libro rojo",
    "de": "rotes Buch",
    "ja": "あかい",
}
FIRST = ("espeak", "en-us", "f3")
FESTIVAL = ("festival", "cmu_us_slt_arctic_hts", "")
HAS_FESTIVAL = Path("/usr/share/festival/voices/us", FESTIVAL[1]).is_dir()
CLIP = {"kind": "speech", "text": "two red books", "voice": list(FIRST)}
needs_engines = pytest.mark.skipif(
    not (find_library("espeak-ng") and find_library("flite")),
    reason="needs the libraries of espeak-ng and flite (apt install espeak-ng flite)",
)


def rms(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.square(waveform, dtype=np.float64).mean()))


def decibels(ratio: float) -> float:
    return float(20 * np.log10(ratio))


# Voices


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
    engines = {s: {voice.engine for voice in speech.voices("en", s)} for s in ("train", "test")}
    others = {"flite", "rhvoice", "pico"}
    assert engines == {"train": {"espeak"} | others, "test": {"espeak", "flite", "festival"}}


@needs_engines
@pytest.mark.parametrize("lang", WORDS)
def test_every_voice_speaks_and_no_two_alike(lang: str) -> None:
    """Each variant with one of the language's accents, each accent with one variant."""
    first = speech.LANGUAGES[lang][0]
    spoken = {}
    for split in ("train", "test"):
        for voice in speech.voices(lang, split):
            if voice.name != first and voice.variant != "f3" and voice.engine == "espeak":
                continue
            if voice.engine not in ("espeak", "flite"):
                continue  # tested below
            waveform = speech.speak(WORDS[lang], voice, rate=220)
            assert waveform.dtype == np.float32
            assert 0.15 < len(waveform) / RATE < 2.5, voice
            assert rms(waveform) > 0.004, voice
            assert np.abs(waveform).max() < 0.99, voice
            spoken[waveform.tobytes()] = voice
    wanted = [v for s in ("train", "test") for v in speech.voices(lang, s) if v.name == first]
    flite = 5 if lang == "en" else 0
    assert len(spoken) == len(wanted) + len(speech.LANGUAGES[lang]) - 1 + flite


@needs_engines
def test_drawn_voices_speak_each_in_its_own_way() -> None:
    spoken, pitches = {}, {"man": [], "woman": []}
    for number in range(40):
        voice = speech.drawn("en", "en-us", number)
        assert speech.voice(*voice.key) == voice
        waveform = speech.speak("two red books", voice)
        assert 0.5 < len(waveform) / RATE < 3 and rms(waveform) > 0.002, voice
        spoken[waveform.tobytes()] = voice
        pitches[voice.gender].append(pitch_of(waveform))
    assert len(spoken) == 40
    assert np.median(pitches["woman"]) > 1.4 * np.median(pitches["man"])
    again = speech.speak("two red books", speech.drawn("en", "en-us", 0))
    assert again.tobytes() in spoken
    # espeak-ng's own voices are as they were
    assert speech.speak("two red books", speech.voice(*FIRST)).tobytes() not in spoken


@pytest.mark.parametrize("key", [("rhvoice", "clb", ""), ("pico", "it-IT", "")])
def test_other_engines_speak_at_the_asked_rate(key: tuple[str, str, str]) -> None:
    program = {"rhvoice": "RHVoice-test", "pico": "pico2wave"}[key[0]]
    if shutil.which(program) is None:
        pytest.skip(f"needs {program} (Debian's non-free part)")
    voice = speech.voice(*key)
    slow, fast = (speech.speak("uno & due tre <", voice, rate=rate) for rate in (120, 200))
    assert rms(fast) > 0.003 and len(slow) > 1.4 * len(fast)


@needs_engines
def test_speech_does_not_depend_on_what_was_spoken_before() -> None:
    trembling = speech.voice("espeak", "en-us", "croak")
    breath = speech.voice("flite", "awb", "")
    first = [speech.speak("seven red books", voice) for voice in (trembling, breath)]
    speech.speak("etwas anderes", speech.voice("espeak", "de", "whisper"))
    again = [speech.speak("seven red books", voice) for voice in (trembling, breath)]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(
    not HAS_FESTIVAL, reason="needs festival (apt install festival festvox-us-slt-hts)"
)
def test_festival_speaks_at_the_asked_rate() -> None:
    voice = speech.voice(*FESTIVAL)
    slow, fast = (speech.speak('five "red" apples', voice, rate=rate) for rate in (120, 200))
    assert rms(fast) > 0.003
    assert len(slow) > 1.4 * len(fast)
    np.testing.assert_array_equal(slow, speech.speak('five "red" apples', voice, rate=120))


@needs_engines
def test_a_missing_engine_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # festival is the one that is a program
    monkeypatch.setattr(speech, "_server", None)
    with pytest.raises(SystemExit) as stop:
        make_tiny_data.main(["--out", str(tmp_path / "data")])
    assert stop.value.code == 2 and not (tmp_path / "data").exists()
    assert "festival is not installed" in capsys.readouterr().err
    make_tiny_data.check_engines(["pretrain", "words", "sft"])
    with pytest.raises(speech.SpeechError, match="RHVoice-test is not installed"):
        make_tiny_data.check_engines(["engines"])


@needs_engines
def test_an_engine_that_breaks_harms_no_other(tmp_path, monkeypatch) -> None:
    """Its process ends with an error of its own, and takes nothing with it that all speak by."""
    fake = tmp_path / "RHVoice-test"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; : > "$2"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(speech, "_server", None)
    ours = speech.drawn("en", "en-us", 4)
    before = speech.speak("Ten.", ours)
    with pytest.raises(speech.SpeechError, match="EOFError"):
        speech.speak("Ten.", speech.voice("rhvoice", "alan", ""))
    assert np.array_equal(speech.speak("Ten.", ours), before)


@needs_engines
@pytest.mark.parametrize("key", [FIRST, ("flite", "slt", "")])
def test_rate_and_pitch_do_what_they_say(key: tuple[str, str, str]) -> None:
    voice = speech.voice(*key)
    text = "one two three four five"
    slow, fast = (speech.speak(text, voice, rate=rate) for rate in (100, 250))
    assert len(slow) > 1.6 * len(fast)
    low, high = (pitch_of(speech.speak(text, voice, pitch=pitch)) for pitch in (5, 95))
    assert high > 1.2 * low


def pitch_of(waveform: np.ndarray) -> float:
    """The median frequency, in Hz, of the loud 40 ms frames, by autocorrelation."""
    frames = np.lib.stride_tricks.sliding_window_view(waveform, 640)[::320]
    frames = frames[np.square(frames).mean(axis=1) > 0.3 * np.square(frames).mean(axis=1).max()]
    alike = np.fft.irfft(np.square(np.abs(np.fft.rfft(frames, 2048))))[:, RATE // 450 : RATE // 60]
    return float(RATE / np.median(RATE // 450 + alike.argmax(axis=1)))


@needs_engines
def test_what_cannot_be_spoken_is_said_in_one_line() -> None:
    voice = speech.voice(*FIRST)
    with pytest.raises(speech.SpeechError, match="says nothing"):
        speech.speak(" ", voice)
    with pytest.raises(speech.SpeechError, match="80 to 400"):
        speech.speak("red", voice, rate=20)
    with pytest.raises(speech.SpeechError, match="no voices for language 'tlh'"):
        speech.voices("tlh", "train")
    with pytest.raises(speech.SpeechError, match="espeak-ng has no voice 'zz'"):
        speech.speak("red", speech.Voice("espeak", "zz", "", "en", None, "train"))
    assert len(speech.speak("red", voice)) > 0  # the process lives on


# Word times


@needs_engines
def test_word_times_are_where_the_words_are() -> None:
    """Pauses between the words are silent, words are loud, and the waveform is speak's."""
    text = "seven, books, don't, go"
    voice = speech.voice(*FIRST)
    waveform, heard = speech.speak_with_times(text, voice)
    np.testing.assert_array_equal(waveform, speech.speak(text, voice))
    assert [word for word, _, _ in heard] == text.split()
    end = 0.0
    for _, start, stop in heard:
        assert end <= start < stop <= len(waveform) / RATE
        loud = rms(waveform[round(start * RATE) : round(stop * RATE)])
        if end:
            pause = waveform[round((end + 0.05) * RATE) : round((start - 0.005) * RATE)]
            assert len(pause) > 0.1 * RATE
            assert rms(pause) < 0.02 * loud
        end = stop
    assert heard[0][1] <= speech.EDGE / RATE
    assert len(waveform) / RATE - heard[-1][2] <= speech.EDGE / RATE + 0.05


@needs_engines
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("en-us", "one of the 45 men", ["one", "of the", "45", "men"]),
        ("yue", "我想饮茶", ["我", "想", "饮", "茶"]),
        ("cmn-latn-pinyin", "jin1tian1 tian1qi4", ["jin1tian1", "tian1qi4"]),
        ("fr", "l'été, c'est rouge", ["l'été,", "c'est", "rouge"]),
        ("de", "drei Äpfel übrigens", ["drei", "Äpfel", "übrigens"]),
    ],
)
def test_words_of_word_times(name: str, text: str, words: list[str]) -> None:
    _, heard = speech.speak_with_times(text, speech.voice("espeak", name, "m4"))
    assert [word for word, _, _ in heard] == words


# Rendering


@needs_engines
def test_sounds_of_speech_are_where_they_are_heard() -> None:
    clip = {"kind": "speech", "text": "see sue", "voice": ["espeak", "en-us", "m3"], "at": 0.5}
    waveform, heard = render.render_with_sounds(clip, 0)
    assert np.array_equal(waveform, render.render(clip, 0))
    names, starts = zip(*heard, strict=True)
    assert names[-1] == "" and list(starts) == sorted(starts) and starts[0] >= 0.5
    hiss = [name == "s" for name in names]
    assert sum(hiss) == 2
    for i, (name, start) in enumerate(heard[:-1]):
        if not name:
            continue
        piece = waveform[round(RATE * start) : round(RATE * heard[i + 1][1])]
        power = np.abs(np.fft.rfft(piece)) ** 2
        high = power[len(power) // 2 :].sum() / power.sum()  # above 4 kHz
        assert (high > 0.4) == hiss[i], (name, start, high)
    other = {"kind": "sound", "name": "siren", "seconds": 1.0}
    assert render.render_with_sounds(other, 0)[1] == []
    assert np.array_equal(render.render_with_sounds(other, 0)[0], render.render(other, 0))


@needs_engines
@pytest.mark.parametrize("gain_db", [-3, -20])
def test_the_peak_is_the_asked_one(gain_db: float) -> None:
    waveform = render.render({**CLIP, "gain_db": gain_db, "reverb": 0.3}, 0)
    assert decibels(np.abs(waveform).max()) == pytest.approx(gain_db, abs=0.01)


@needs_engines
def test_nothing_clips_and_level_differences_survive() -> None:
    loud = {**CLIP, "gain_db": 0, "noise": {"kind": "white", "snr_db": 0}}
    both = render.render({"kind": "mixture", "parts": [loud, loud]}, 0)
    assert np.abs(both).max() == pytest.approx(1)
    beep = {"kind": "sound", "name": "horn", "seconds": 1.0}
    parts = [{**beep, "gain_db": 12}, {**beep, "gain_db": -8}]
    waveform = render.render({"kind": "sequence", "parts": parts, "gap": 0.5}, 0)
    assert len(waveform) == 2.5 * RATE
    assert np.abs(waveform).max() == pytest.approx(1)
    first, second = waveform[:RATE], waveform[-RATE:]
    assert decibels(np.abs(first).max() / np.abs(second).max()) == pytest.approx(20, abs=0.01)
    assert not waveform[RATE : RATE + RATE // 2].any()


@needs_engines
@pytest.mark.parametrize("kind", sounds.NOISES)
def test_noise_lies_as_far_below_speech_as_asked(kind: str) -> None:
    clean = {**CLIP, "gain_db": -12, "at": 0.5, "pad": 0.5}
    dry = render.render(clean, 0)
    wet = render.render({**clean, "noise": {"kind": kind, "snr_db": 15}}, 0)
    assert not dry[: RATE // 2].any()
    speech_level = render.active_rms(dry[RATE // 2 : -RATE // 2])
    assert decibels(speech_level / rms(wet - dry)) == pytest.approx(15, abs=0.05)
    hush = {"kind": "silence", "seconds": 1.0, "noise": {"kind": kind, "level_db": -50}}
    assert decibels(rms(render.render(hush, 0))) == pytest.approx(-50, abs=0.05)


def test_a_low_rate_takes_the_high_frequencies_away() -> None:
    clip = {"kind": "noise", "name": "white", "seconds": 1.0, "gain_db": -6}
    full, low = (render.render({**clip, "sample_rate": rate}, 0) for rate in (None, 8000))
    assert len(full) == len(low) == RATE
    power = [np.square(np.abs(np.fft.rfft(waveform))) for waveform in (full, low)]
    assert power[1][4100:].sum() < 1e-3 * power[0][4100:].sum()
    assert power[1][:3400].sum() == pytest.approx(power[0][:3400].sum(), rel=0.02)


def test_a_room_answers_longer_the_larger_it_is() -> None:
    click = np.zeros(RATE // 10)
    click[0] = 1.0
    tails = []
    for amount in (0.2, 1.0):
        answer = render.reverberate(click, amount, np.random.default_rng(0))
        assert answer[0] == pytest.approx(1, abs=1e-5)  # the direct sound stays as it is
        energy = np.cumsum(np.square(answer[::-1]))[::-1]
        tails.append(np.argmax(energy < 1e-3 * energy[1]) / RATE)  # 30 dB down
    assert tails[1] > 2 * tails[0] > 0


@pytest.mark.parametrize(
    "clip",
    [
        {"kind": "song"},
        {"kind": "sound", "name": "unicorn"},
        {"kind": "noise", "name": "green", "seconds": 1},
        {"kind": "melody", "direction": "up", "tempo": "fast", "timbre": "flute"},
    ],
)
def test_a_description_that_makes_no_sense_is_refused(clip: dict) -> None:
    with pytest.raises(ValueError, match="one of"):
        render.render(clip, 0)


# Sounds


@pytest.mark.parametrize("kind", sounds.NOISES)
def test_noise_has_unit_level(kind: str) -> None:
    waveform = sounds.noise(np.random.default_rng(0), kind, 1.5)
    assert waveform.shape == (24_000,)
    assert rms(waveform) == pytest.approx(1)


def test_slopes_of_noise() -> None:
    """From 250 Hz to 4 kHz, four octaves: 0, 3 and 6 dB less power per hertz in each."""
    for kind, fall in (("white", 0), ("pink", 12), ("brown", 24)):
        waveform = sounds.noise(np.random.default_rng(1), kind, 8.0)
        power = np.square(np.abs(np.fft.rfft(waveform)))
        low, high = (power[8 * a : 8 * b].mean() for a, b in ((225, 275), (3900, 4100)))
        assert 10 * np.log10(low / high) == pytest.approx(fall, abs=1.5)


def features(waveform: np.ndarray) -> np.ndarray:
    """Mean and spread of each mel bin over time: (256,)."""
    windows = np.lib.stride_tricks.sliding_window_view(waveform, 400)[::160] * np.hanning(400)
    mel = np.square(np.abs(np.fft.rfft(windows))) @ frontend.mel_filters().numpy().T
    mel = np.log10(np.maximum(mel, mel.max() * 1e-8)) / 4
    return np.concatenate([mel.mean(axis=0), mel.std(axis=0)])


def test_sounds_of_a_class_vary_and_classes_differ() -> None:
    """Eight sounds of each class make its mean; of three new ones, 80 % lie nearest to theirs."""
    drawn = {
        name: [
            features(render.render({"kind": "sound", "name": name, "seconds": 1.5}, seed))
            for seed in range(11)
        ]
        for name in sounds.SOUNDS
    }
    assert len(drawn) >= 20
    centres = np.stack([np.mean(rows[:8], axis=0) for rows in drawn.values()])
    for name, rows in drawn.items():
        assert np.std(rows, axis=0).max() > 0.05, f"{name} is always the same"
    right = [
        np.square(centres - row).sum(axis=1).argmin() == i
        for i, rows in enumerate(drawn.values())
        for row in rows[8:]
    ]
    assert np.mean(right) >= 0.8


@pytest.mark.parametrize("name", sounds.SOUNDS)
@pytest.mark.parametrize("seconds", [0.5, 3.3])
def test_a_sound_is_as_long_as_asked_and_heard(name: str, seconds: float) -> None:
    waveform = sounds.sound(name, np.random.default_rng(3), seconds)
    assert waveform.shape == (round(seconds * RATE),)
    assert np.isfinite(waveform).all()
    assert np.abs(waveform).max() > 0
    again = sounds.sound(name, np.random.default_rng(3), seconds)
    np.testing.assert_array_equal(waveform, again)


@pytest.mark.parametrize("direction", sounds.DIRECTIONS)
@pytest.mark.parametrize("tempo", sounds.TEMPOS)
def test_notes_of_a_melody(direction: str, tempo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each note above or below the last; fast ones follow at 5 to 8 a second, slow ones at 1.5
    to 2.5."""
    notes: list[float] = []

    def click(rng: np.random.Generator, hertz: float, seconds: float) -> np.ndarray:
        notes.append(hertz)
        return np.array([1.0])

    monkeypatch.setitem(sounds.TIMBRES, "click", click)
    for seed in range(10):
        notes.clear()
        waveform = sounds.melody(np.random.default_rng(seed), direction, tempo, "click")
        steps = np.diff(notes)
        assert len(notes) >= 4
        assert (steps > 0).all() if direction == "rising" else (steps < 0).all()
        assert 100 < min(notes) < max(notes) < 2500
        rate = 1 / (np.diff(np.flatnonzero(waveform)) / RATE)
        low, high = (5, 8) if tempo == "fast" else (1.5, 2.5)
        assert ((rate > low - 0.01) & (rate < high + 0.01)).all()
        assert 0.9 < len(waveform) / RATE < 4.5


@pytest.mark.parametrize("timbre", sounds.TIMBRES)
def test_a_note_has_its_pitch(timbre: str) -> None:
    """At least 80 % of its energy lies within 3 % of multiples of its frequency, or of half."""
    hertz = 330.0
    note = sounds.TIMBRES[timbre](np.random.default_rng(0), hertz, 0.5)
    power = np.square(np.abs(np.fft.rfft(note)))
    frequency = np.arange(len(power)) * RATE / len(note)
    multiple = np.maximum(np.round(frequency / (hertz / 2)), 1)
    near = np.abs(frequency - multiple * hertz / 2) < 0.03 * frequency.clip(max=1500)
    assert power[near & (frequency < 4000)].sum() > 0.8 * power.sum()


def test_descriptions_drawn_are_rendered_and_captioned() -> None:
    rng = random.Random(0)
    for seed in range(20):
        clip = sounds.draw(rng, test=seed % 2 == 1)
        waveform = render.render(clip, seed)
        assert waveform.dtype == np.float32
        assert 0.01 < np.abs(waveform).max() <= 1
        assert sounds.caption(clip).endswith(".")
        np.testing.assert_array_equal(waveform, render.render(clip, seed))
