"""Text to speech for the small model's data: espeak-ng in eight languages, and other engines.

Every voice belongs to one split for good: "train", or "test", which training never hears. Of
espeak-ng's variants (one voice file each, usable with every language) sixteen are held out, none
of which has a twin in training. Training also has DRAWN voices that espeak-ng does not come with:
its own settings of pitch, formants, breath and so on, drawn at random. Of flite's English voices
slt is held out; its method (clustergen) is known from awb and rms. festival is held out as a whole;
its voice is the same woman by another method (HTS), which of training's voices RHVoice's have.

    voice = speech.voices("en", "train")[0]
    waveform = speech.speak("seven red books", voice, rate=160, pitch=50)      # (N,) at 16 kHz
"""

import atexit
import json
import os
import random
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr

RATE = 16_000
EDGE = int(0.07 * RATE)  # what is left of the silence around speech

# language tag of the model -> espeak-ng's voices, by names that its library takes with a variant
LANGUAGES = {
    "en": (
        "en-us",
        "gmw/en",
        "en-gb-scotland",
        "en-gb-x-rp",
        "en-029",
        "en-gb-x-gbclan",
        "en-gb-x-gbcwmd",
        "en-us-nyc",
    ),
    "zh": ("cmn-latn-pinyin",),  # reads pinyin with tone numbers, ni3hao3
    "yue": ("yue",),
    "fr": ("fr", "fr-be", "fr-ch"),
    "it": ("it",),
    "es": ("es", "es-419"),
    "de": ("de",),
    "ja": ("ja",),  # reads kana
}

# espeak-ng's variants. "" is the language's own voice, a man's in espeak-ng's own list. Variants
# whose file says nothing of a person's sex (robots, Klatt's synthesiser) have none here either.
# Left out: those that sound like another (caleb, klatt6, steph2, fast), the demon, the announcer.
TRAIN_MEN = (
    "", "Alex", "Andy", "AnxiousAndy", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo",
    "Jacky", "Lee", "Mario", "Michael", "Mike", "Mr serious", "Storm", "adam", "antonio",
    "benjamin", "boris", "croak", "ed", "edward", "edward2", "gustave", "iven",
    "iven2", "iven3", "iven4", "john", "m1", "m2", "m3", "m5", "m6", "m7", "m8", "marcelo", "max",
    "michel", "miguel", "norbert", "pablo", "pedro", "rob", "robert", "sandro", "whisper",
)  # fmt: skip
TRAIN_WOMEN = (
    "Alicia", "Andrea", "Annie", "anika", "aunty", "f1", "f2", "f3", "f4", "grandma",
)  # fmt: skip
TRAIN_OTHERS = (
    "Nguyen", "RicishayMax", "RicishayMax2", "RicishayMax3", "Tweaky", "UniRobot", "anikaRobot",
    "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "robosoft", "robosoft2", "robosoft3",
    "robosoft4", "robosoft5", "robosoft6", "robosoft7", "robosoft8", "zac",
)  # fmt: skip
TEST_MEN = ("Marco", "david", "grandpa", "m4", "paul", "quincy", "travis", "victor")
TEST_WOMEN = ("belinda", "linda", "f5", "steph", "steph3", "whisperf")
TEST_OTHERS = ("kaukovalta", "shelby")
VARIANTS = {
    "train": {"man": TRAIN_MEN, "woman": TRAIN_WOMEN, None: TRAIN_OTHERS},
    "test": {"man": TEST_MEN, "woman": TEST_WOMEN, None: TEST_OTHERS},
}
WHISPERS = ("whisper", "whisperf")
# Voices of the other engines by language: (engine, name, gender).
OTHERS = {
    "train": {
        "en": (
            ("flite", "kal", "man"),
            ("flite", "kal16", "man"),
            ("flite", "awb", "man"),
            ("flite", "rms", "man"),
            ("rhvoice", "alan", "man"),
            ("rhvoice", "bdl", "man"),
            ("rhvoice", "clb", "woman"),
            ("pico", "en-US", "woman"),
            ("pico", "en-GB", "woman"),
        ),
        "de": (("pico", "de-DE", "woman"),),
        "es": (("pico", "es-ES", "woman"),),
        "fr": (("pico", "fr-FR", "woman"),),
        "it": (("pico", "it-IT", "woman"),),
    },
    "test": {
        "en": (("flite", "slt", "woman"), ("festival", "cmu_us_slt_arctic_hts", "woman")),
    },
}

# Voices of training's own drawing: "drawn 0" and so on. Even ones are men's, odd ones women's.
DRAWN = 4_000


class SpeechError(RuntimeError):
    """An engine is missing or refuses: one line, what is wrong and what to do."""


@dataclass(frozen=True)
class Voice:
    engine: str  # "espeak", "flite", "rhvoice", "pico" or "festival"
    name: str  # the engine's voice: "en-us", "slt"
    variant: str  # espeak-ng's variant: "f3", or "" for the language's own voice
    language: str  # the model's language tag
    gender: str | None  # "man", "woman", or None where the synthesiser does not say
    split: str  # "train" or "test"

    @property
    def manner(self) -> str | None:
        """ "whisper" where the voice is a whisper's, else None."""
        return "whisper" if self.variant in WHISPERS else None

    @property
    def number(self) -> int | None:
        """Of a voice of training's own drawing, else None."""
        return _number(self.variant)

    @property
    def key(self) -> list[str]:
        """[engine, name, variant], as clip descriptions name a voice."""
        return [self.engine, self.name, self.variant]


@lru_cache
def voices(language: str, split: str) -> list[Voice]:
    """All voices of a language tag in "train" or "test", in a fixed order.

    espeak-ng gives each of the language's accents times each of the split's variants.
    """
    if language not in LANGUAGES or split not in VARIANTS:
        raise SpeechError(
            f"no voices for language {language!r}, split {split!r}: "
            f"languages are {', '.join(LANGUAGES)}, splits train and test"
        )
    found = [
        Voice("espeak", name, variant, language, gender, split)
        for name in LANGUAGES[language]
        for gender, variants in VARIANTS[split].items()
        for variant in variants
    ]
    found += [
        Voice(engine, name, "", language, gender, split)
        for engine, name, gender in OTHERS[split].get(language, ())
    ]
    return found


def _number(variant: str) -> int | None:
    """Of a variant that `drawn` names, else None."""
    return int(variant.removeprefix("drawn ")) if variant.startswith("drawn ") else None


def drawn(language: str, name: str, number: int) -> Voice:
    """Voice `number` of DRAWN in an accent `name` of the language."""
    gender = ("man", "woman")[number % 2]
    return Voice("espeak", name, f"drawn {number}", language, gender, "train")


@lru_cache
def settings(number: int) -> str:
    """espeak-ng's voice file of a drawn voice (its format: docs/voices.md of espeak-ng).

    Pitch (Hz), and for each of the nine peaks of its spectrum frequency, height and width in per
    cent of its own. A woman's voice is higher and its peaks too; else both sexes vary alike, most
    voices a little and some far more, as espeak-ng's own variants do.
    """
    rng = random.Random(f"voice/{number}")
    woman = number % 2 == 1
    base = rng.uniform(135, 215) if woman else rng.uniform(58, 115)
    top = base + (rng.uniform(25, 95) if woman else rng.uniform(15, 60))
    scale = rng.gauss(1.13 if woman else 0.95, 0.06)
    wild = rng.choice((0.05, 0.09, 0.2))
    lines = ["language variant", "name drawn", f"gender {'female' if woman else 'male'}"]
    lines.append(f"pitch {base:.0f} {top:.0f}")
    thin = rng.random() < 0.3  # hardly anything of the upper peaks
    for peak in range(9):
        frequency = 100 * min(max(scale * rng.gauss(1.0, wild), 0.4), 1.6)
        height = 100 * min(max(rng.lognormvariate(-0.1, 0.15 + 1.5 * wild), 0.2), 2.0)
        width = 100 * min(max(rng.lognormvariate(0.1, 0.15 + 1.2 * wild), 0.4), 2.0)
        if peak == 0:
            frequency = 100 * rng.gauss(1.0, wild)
        if peak >= 4 and (thin or rng.random() < 0.1):
            frequency, height = (100 * rng.uniform(0.1, 1.1), 100 * rng.uniform(0, 0.4))
        lines.append(f"formant {peak} {frequency:.0f} {height:.0f} {width:.0f}")
    if rng.random() < 0.6:
        lines.append(f"voicing {100 * 2 ** rng.uniform(-1.7, 1.0):.0f}")
    if rng.random() < 0.6:
        lines.append(f"consonants {rng.randint(40, 150)} {rng.randint(40, 150)}")
    if rng.random() < 0.5:
        at = sorted(rng.sample(range(1, 50), rng.choice((3, 4))))
        heights = [round(10 ** rng.uniform(1.2, 2.4)) for _ in at]
        tone = " ".join(
            f"{100 * hertz} {height}" for hertz, height in zip(at, heights, strict=True)
        )
        lines.append(f"tone {tone}")
    if rng.random() < 0.6:
        lines.append(f"flutter {rng.choice((0, 1, 3, 6, 12, 20))}")
    if rng.random() < 0.5:
        lines.append(f"roughness {rng.randint(0, 5)}")
    if rng.random() < 0.25:
        lines.append(f"echo {rng.randint(10, 200)} {rng.randint(5, 60)}")
    if rng.random() < 0.3:
        lines.append("breath " + " ".join(str(rng.randint(0, 6)) for _ in range(8)))
    if rng.random() < 0.3:
        lines.append("stressAmp " + " ".join(str(rng.randint(12, 36)) for _ in range(8)))
    if rng.random() < 0.2:
        lines.append("stressAdd " + " ".join(str(rng.randint(-20, 200)) for _ in range(8)))
    if rng.random() < 0.3:
        lines.append(f"intonation {rng.randint(1, 4)}")
    if rng.random() < 0.15:
        lines.append(f"klatt {rng.randint(1, 6)}")
    return "\n".join(lines) + "\n"


@lru_cache
def voice(engine: str, name: str, variant: str) -> Voice:
    """The voice that a clip description names by [engine, name, variant]."""
    if (number := _number(variant)) is not None:
        language = next(tag for tag, names in LANGUAGES.items() if name in names)
        return drawn(language, name, number)
    for language in LANGUAGES:
        for split in VARIANTS:
            for known in voices(language, split):
                if known.key == [engine, name, variant]:
                    return known
    raise SpeechError(f"no voice [{engine!r}, {name!r}, {variant!r}] (see speech.voices)")


class Server:
    """The process of engines.py, started once for each process that speaks."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", str(Path(__file__).with_name("engines.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.owner = os.getpid()
        self.lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, request: dict) -> tuple[dict, bytes]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.lock:
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = b""
            if not line:
                raise SpeechError("the speaking process ended (engines.py); its message is above")
            about = json.loads(line)
            if "error" in about:
                raise SpeechError(about["error"])
            return about, self.process.stdout.read(about["bytes"])

    def close(self) -> None:
        if self.owner == os.getpid() and self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()


_server: Server | None = None


def synthesise(
    text: str, voice: Voice, rate: int, pitch: int, events: bool = False
) -> tuple[np.ndarray, list[tuple[str, Any, float]]]:
    """The engine's own samples, resampled: ((N,) float32 at 16 kHz, events with their seconds)."""
    global _server
    if not 80 <= rate <= 400 or not 0 <= pitch <= 99:
        raise SpeechError(
            f"rate is {rate}, pitch {pitch}: rate is 80 to 400 words a minute, pitch 0 to 99"
        )
    if _server is None or _server.owner != os.getpid():  # a forked worker starts its own
        _server = Server()
    about, data = _server.ask(
        {
            "engine": voice.engine,
            "name": voice.name,
            "variant": voice.variant,
            "settings": "" if voice.number is None else settings(voice.number),
            "text": text,
            "rate": rate,
            "pitch": pitch,
            "events": events,
        }
    )
    waveform = np.frombuffer(data, dtype=np.int16).astype(np.float32) / 32768
    found = [(what, where, sample / about["rate"]) for what, where, sample in about["events"]]
    return soxr.resample(waveform, about["rate"], RATE, quality="HQ"), found


def speech_bounds(waveform: np.ndarray) -> tuple[int, int]:
    """First sample and one past the last of what is louder than 1 % of the peak, with its edge."""
    loud = np.flatnonzero(np.abs(waveform) > 0.01 * np.abs(waveform).max(initial=0))
    if not len(loud):
        return 0, 0
    return max(0, loud[0] - EDGE), min(len(waveform), loud[-1] + 1 + EDGE)


def speak(text: str, voice: Voice, rate: int = 160, pitch: int = 50) -> np.ndarray:
    """Speak `text`: (N,) float32 at 16 kHz, with up to 0.07 s of silence left around it.

    rate  words a minute, 80 to 400; pitch 0 to 99 (flite: plus and minus half an octave; its rms
    voice and festival keep their own pitch). Equal arguments give equal samples, whatever was
    spoken before.
    Raises SpeechError where the engine is missing or the text gives no sound.
    """
    waveform, _ = synthesise(text, voice, rate, pitch)
    start, end = _bounds(waveform, text, voice)
    return waveform[start:end]


def speak_with_times(
    text: str, voice: Voice, rate: int = 160, pitch: int = 50
) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Speak, and tell when each word is heard: (waveform, [(word, start, end), ...]) in seconds.

    The waveform is speak's. Words are what stands between spaces, with their punctuation; in
    Chinese characters and kana what espeak-ng takes for a word (of Cantonese, a character). Where
    espeak-ng says several words as one ("of the"), they come as one. start is where the word's
    first sound begins, end where its last one gives way to the next word or to a pause: espeak-ng's
    own events, exact to a few milliseconds. Raises SpeechError for the other engines, which tell no
    times.
    """
    if voice.engine != "espeak":
        raise SpeechError(f"{' '.join(voice.key)} tells no word times; an espeak voice does")
    waveform, events = synthesise(text, voice, rate, pitch, events=True)
    first, end = _bounds(waveform, text, voice)
    heard = [
        (word, max(0.0, start - first / RATE), min(stop, end / RATE) - first / RATE)
        for word, start, stop in word_times(text, events, len(waveform) / RATE)
    ]
    return waveform[first:end], heard


def speak_with_sounds(
    text: str, voice: Voice, rate: int = 160, pitch: int = 50
) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """Speak, and tell which speech sound begins when: (waveform, [(name, start), ...]) in seconds.

    The waveform is speak's. Names are espeak-ng's own for a language's sounds ("tS", "a:"), "" is a
    pause; the last entry is the pause behind the speech. Raises SpeechError as speak_with_times.
    """
    if voice.engine != "espeak":
        raise SpeechError(f"{' '.join(voice.key)} tells no times; an espeak voice does")
    waveform, events = synthesise(text, voice, rate, pitch, events=True)
    first, end = _bounds(waveform, text, voice)
    heard = [
        (str(name) if what == "sound" else "", max(0.0, now - first / RATE))
        for what, name, now in events
        if what != "word"
    ]
    return waveform[first:end], [*heard, ("", (end - first) / RATE)]


def word_times(
    text: str, events: list[tuple[str, Any, float]], seconds: float
) -> list[tuple[str, float, float]]:
    """Words of `text` and their times, from the events of an utterance that lasts `seconds`."""
    firsts = {match.start() for match in re.finditer(r"\S+", text)}
    places: list[int] = []  # where each word starts in the text
    spans: list[list[float]] = []  # its first sound's start, its last sound's end
    inside = False  # a sound of the last word is under way
    for what, where, now in [*events, ("pause", "", seconds)]:
        if inside:
            spans[-1][1] = now
            inside = False
        if what == "word":
            while where not in firsts and where > 0 and not is_own_word(text[where : where + 1]):
                where -= 1  # a part, as the "t" of "don't": it belongs to what began before
            if not places or where > places[-1]:
                places.append(where)
                spans.append([])
        elif what == "sound" and spans:
            if not spans[-1]:
                spans[-1][:] = [now, now]
            inside = True
    return [
        (text[place:after].strip(), *span)
        for place, after, span in zip(places, [*places[1:], len(text)], spans, strict=True)
        if span
    ]


def is_own_word(sign: str) -> bool:
    """Whether a word may begin at this sign without a space before: Chinese, Japanese."""
    return sign >= "\u2e80"


def _bounds(waveform: np.ndarray, text: str, voice: Voice) -> tuple[int, int]:
    start, end = speech_bounds(waveform)
    if start == end:
        raise SpeechError(f"{' '.join(voice.key)} says nothing for {text!r}")
    return start, end
