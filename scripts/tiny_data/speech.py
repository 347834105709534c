"""Text to speech for the tiny model's data: espeak-ng in eight languages, flite in English.

Every voice belongs to one split for good: "train", or "test", which training never hears.
Of espeak-ng's variants (one voice file each, usable with every language) whole families are held
out, so that no test voice has a twin in training; of flite's voices slt is held out.

    voice = speech.voices("en", "train")[0]
    waveform = speech.speak("seven red books", voice, rate=160, pitch=50)      # (N,) at 16 kHz
"""

import atexit
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soxr

RATE = 16_000
EDGE = int(0.07 * RATE)  # what is left of the silence around speech
PACKAGES = "Debian and Ubuntu: apt install espeak-ng flite"

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
TRAIN_MEN = (
    "", "Alex", "Andy", "AnxiousAndy", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo",
    "Jacky", "Lee", "Mario", "Michael", "Mike", "Mr serious", "Storm", "adam", "antonio",
    "benjamin", "boris", "caleb", "croak", "ed", "edward", "edward2", "gustave", "iven", "iven2",
    "iven3", "iven4", "john", "m1", "m2", "m3", "m5", "m6", "m7", "m8", "marcelo", "max", "michel",
    "miguel", "norbert", "pablo", "pedro", "rob", "robert", "sandro", "whisper",
)  # fmt: skip
TRAIN_WOMEN = (
    "Alicia", "Andrea", "Annie", "anika", "aunty", "f1", "f2", "f3", "f4", "grandma",
)  # fmt: skip
TRAIN_OTHERS = (
    "Nguyen", "RicishayMax", "RicishayMax2", "RicishayMax3", "Tweaky", "UniRobot", "Zac",
    "anikaRobot", "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "klatt6", "robosoft",
    "robosoft2", "robosoft3", "robosoft4", "robosoft5", "robosoft6", "robosoft7", "robosoft8",
)  # fmt: skip
TEST_MEN = ("Marco", "david", "grandpa", "m4", "paul", "quincy", "travis", "victor")
TEST_WOMEN = ("belinda", "linda", "f5", "steph", "steph2", "steph3", "whisperf")
TEST_OTHERS = ("kaukovalta", "shelby")
VARIANTS = {
    "train": {"man": TRAIN_MEN, "woman": TRAIN_WOMEN, None: TRAIN_OTHERS},
    "test": {"man": TEST_MEN, "woman": TEST_WOMEN, None: TEST_OTHERS},
}
WHISPERS = ("whisper", "whisperf")
FLITE = {"train": {"man": ("kal", "kal16", "awb", "rms")}, "test": {"woman": ("slt",)}}


class SpeechError(RuntimeError):
    """An engine is missing or refuses: one line, what is wrong and what to do."""


@dataclass(frozen=True)
class Voice:
    engine: str  # "espeak" or "flite"
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
    if language == "en":
        found += [
            Voice("flite", name, "", "en", gender, split)
            for gender, names in FLITE[split].items()
            for name in names
        ]
    return found


@lru_cache
def voice(engine: str, name: str, variant: str) -> Voice:
    """The voice that a clip description names by [engine, name, variant]."""
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
        atexit.register(self.close)

    def ask(self, request: dict) -> tuple[dict, bytes]:
        assert self.process.stdin is not None and self.process.stdout is not None
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


def synthesise(text: str, voice: Voice, rate: int, pitch: int) -> tuple[np.ndarray, list]:
    """The engine's own samples, resampled: ((N,) float32 at 16 kHz, espeak's word events)."""
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
            "text": text,
            "rate": rate,
            "pitch": pitch,
        }
    )
    waveform = np.frombuffer(data, dtype=np.int16).astype(np.float32) / 32768
    return soxr.resample(waveform, about["rate"], RATE, quality="HQ"), about["words"]


def speech_bounds(waveform: np.ndarray) -> tuple[int, int]:
    """First sample and one past the last of what is louder than 1 % of the peak, with its edge."""
    loud = np.flatnonzero(np.abs(waveform) > 0.01 * np.abs(waveform).max(initial=0))
    if not len(loud):
        return 0, 0
    return max(0, loud[0] - EDGE), min(len(waveform), loud[-1] + 1 + EDGE)


def speak(text: str, voice: Voice, rate: int = 160, pitch: int = 50) -> np.ndarray:
    """Speak `text`: (N,) float32 at 16 kHz, with up to 0.07 s of silence left around it.

    rate  words a minute, 80 to 400; pitch 0 to 99 (flite: plus and minus half an octave; its rms
    voice keeps its own pitch). Equal arguments give equal samples, whatever was spoken before.
    Raises SpeechError where the engine is missing or the text gives no sound.
    """
    waveform, _ = synthesise(text, voice, rate, pitch)
    start, end = speech_bounds(waveform)
    if start == end:
        raise SpeechError(
            f"{voice.engine} voice {voice.name}+{voice.variant} says nothing for {text!r}"
        )
    return waveform[start:end]
