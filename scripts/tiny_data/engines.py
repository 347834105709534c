"""A small process that speaks: espeak-ng, flite and festival, one request a line.

    python engines.py < requests > answers       started and fed by speech.py, not by hand

request  one line of JSON: {"engine", "name", "variant", "text", "rate", "pitch", "events": bool}
answer   one line of JSON: {"rate": samples/s, "bytes": n, "events": [[what, where, sample], ...]}
         and then n bytes of int16 samples; or {"error": "why"}
events   of espeak-ng, in order: at this sample a "word" begins, which starts at character `where`
         of the text, or a "sound" of speech, whose name stands for `where`, or a "pause"

espeak-ng and flite are C libraries that carry state from one sentence into the next (the phase of a
trembling voice, the seed of its breath), so that a sentence would sound different after another
one. Therefore each request is spoken in a fork of a process that has never spoken: equal requests,
equal samples. Choosing a voice happens after the fork too: espeak-ng 1.51 now and then speaks
garbage or crashes once it has changed voices often. Only the standard library is imported, which
keeps the fork at about a millisecond. festival, which only the test needs, is a program, run anew
for each sentence.
"""

import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import wave

ESPEAK_RATE = 22_050
FLITE_PITCH = {"kal": 95.0, "kal16": 95.0, "awb": 127.0, "rms": 105.0, "slt": 167.0}  # Hz
FLITE_STRETCH = {"kal": 1.1, "kal16": 1.1, "rms": 0.83}  # for espeak-ng's time at the same rate

Spoken = tuple[int, bytes, list[tuple[str, int | str, int]]]  # samples/s, int16 samples, events


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class Wave(ctypes.Structure):
    """cst_wave of flite."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class FliteVoice(ctypes.Structure):
    """The first two fields of flite's cst_voice."""

    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event))


def load(library: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        raise RuntimeError(
            f"{library} is not installed (Debian and Ubuntu: apt install {package})"
        ) from None


class Espeak:
    """libespeak-ng in its synchronous mode: samples come back through a callback."""

    def __init__(self) -> None:
        self.library = load("libespeak-ng.so.1", "espeak-ng")
        synchronous, phoneme_events = 2, 1
        if self.library.espeak_Initialize(synchronous, 0, None, phoneme_events) != ESPEAK_RATE:
            raise RuntimeError("espeak-ng does not start: is its data (espeak-ng-data) installed?")
        self.samples: list[bytes] = []
        self.events: list[tuple[str, int | str, int]] = []
        self.wants_events = False
        self.callback = CALLBACK(self.collect)  # kept: the library holds only the pointer
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_ListVoices(None)  # reads two hundred files, better once than per fork

    def collect(self, samples: int | None, count: int, events: "ctypes._Pointer[Event]") -> int:
        if samples and count > 0:
            self.samples.append(ctypes.string_at(samples, 2 * count))
        end_of_list, word, phoneme = 0, 1, 7
        i = 0
        while self.wants_events and events[i].type != end_of_list:
            event = events[i]
            if event.type == word:
                self.events.append(("word", event.text_position - 1, event.sample))
            elif event.type == phoneme:
                name = event.id.decode(errors="replace")
                what = "pause" if name.startswith("_") else "sound"
                self.events.append((what, name, event.sample))
            i += 1
        return 0

    def speak(self, request: dict) -> Spoken:
        voice = request["name"] + (f"+{request['variant']}" if request["variant"] else "")
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice!r}")
        rate, volume, pitch, utf8 = 1, 2, 3, 1
        self.library.espeak_SetParameter(volume, 20, 0)  # of 100; above, some variants clip
        self.library.espeak_SetParameter(rate, request["rate"], 0)
        self.library.espeak_SetParameter(pitch, request["pitch"], 0)
        self.wants_events = request["events"]
        text = request["text"].encode()
        self.library.espeak_Synth(text, len(text) + 1, 0, 1, 0, utf8, None, None)
        self.library.espeak_Synchronize()
        return ESPEAK_RATE, b"".join(self.samples), self.events


class Flite:
    """libflite and the voices that come with it."""

    def __init__(self) -> None:
        self.library = load("libflite.so.1", "flite")
        self.library.flite_init()
        for name in ("libflite_usenglish.so.1", "libflite_cmulex.so.1"):
            load(name, "flite")
        self.library.flite_text_to_wave.restype = ctypes.POINTER(Wave)
        self.library.flite_text_to_wave.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        self.library.feat_set_float.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float]
        self.voices = {}
        for name in FLITE_PITCH:
            voice = load(f"libflite_cmu_us_{name}.so.1", "flite")
            register = getattr(voice, f"register_cmu_us_{name}")
            register.restype = ctypes.POINTER(FliteVoice)
            register.argtypes = [ctypes.c_char_p]
            self.voices[name] = register(None)

    def speak(self, request: dict) -> Spoken:
        name = request["name"]
        if name not in self.voices:
            raise RuntimeError(f"flite has no voice {name!r} (known: {', '.join(self.voices)})")
        voice = self.voices[name]
        stretch = FLITE_STRETCH.get(name, 1.0) * 160 / request["rate"]
        hertz = FLITE_PITCH[name] * 2 ** ((request["pitch"] - 50) / 100)
        features = voice.contents.features
        self.library.feat_set_float(features, b"duration_stretch", stretch)
        self.library.feat_set_float(features, b"int_f0_target_mean", hertz)
        spoken = self.library.flite_text_to_wave(request["text"].encode(), voice).contents
        samples = ctypes.string_at(spoken.samples, 2 * spoken.num_samples)
        return spoken.sample_rate, samples, []


class Festival:
    """The program festival. Its statistical voice takes a speed but keeps its own pitch."""

    SPEED = 154  # words a minute of the voice left alone: it then takes espeak-ng's time at 154

    def __init__(self) -> None:
        if shutil.which("festival") is None:
            raise RuntimeError(
                "festival is not installed "
                "(Debian and Ubuntu: apt install festival festvox-us-slt-hts)"
            )

    def speak(self, request: dict) -> Spoken:
        text = request["text"].replace("\\", " ").replace('"', " ")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "spoken.wav")
            commands = (
                f"(voice_{request['name']})"
                f'(set! speed (list (list "-r" {request["rate"] / self.SPEED})))'
                "(set! hts_engine_params (append hts_engine_params speed))"
                f'(set! utterance (utt.synth (Utterance Text "{text}")))'
                f'(utt.save.wave utterance "{path}" \'riff)'
            )
            done = subprocess.run(
                ["festival", "--pipe"], input=commands.encode(), capture_output=True
            )
            if not os.path.exists(path):
                why = " ".join(done.stderr.decode(errors="replace").split())
                raise RuntimeError(
                    f"festival does not speak with {request['name']}: {why} "
                    "(Debian and Ubuntu: apt install festvox-us-slt-hts)"
                )
            with wave.open(path) as spoken:
                return spoken.getframerate(), spoken.readframes(spoken.getnframes()), []


def write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def error(text: str) -> bytes:
    return json.dumps({"error": text}).encode() + b"\n"


def serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks; then stdin ends
    kinds = {"espeak": Espeak, "flite": Flite, "festival": Festival}
    engines: dict[str, Espeak | Flite | Festival] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        name = request["engine"]
        try:
            if name not in engines:
                engines[name] = kinds[name]()
                gc.freeze()
        except RuntimeError as wrong:
            write(error(str(wrong)))
            continue
        child = os.fork()
        if child == 0:
            try:
                rate, samples, events = engines[name].speak(request)
                about = {"rate": rate, "bytes": len(samples), "events": events}
                write(json.dumps(about).encode() + b"\n" + samples)
            except RuntimeError as wrong:
                write(error(str(wrong)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            write(error(f"{name} failed (status {status}) on {request['text']!r}"))


if __name__ == "__main__":
    serve()
