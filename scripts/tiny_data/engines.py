"""A small process that speaks: espeak-ng and other engines, one request a line.

    python engines.py < requests > answers       started and fed by speech.py, not by hand

request  one line of JSON: {"engine", "name", "variant", "settings", "text", "rate", "pitch",
         "events": bool}; settings, where it is not "", is the text of espeak-ng's voice file for
         a variant that espeak-ng does not have
answer   one line of JSON: {"rate": samples/s, "bytes": n, "events": [[what, where, sample], ...]}
         and then n bytes of int16 samples; or {"error": "why"}
events   of espeak-ng, in order: at this sample a "word" begins, which starts at character `where`
         of the text, or a "sound" of speech, whose name stands for `where`, or a "pause"

espeak-ng and flite are C libraries that carry state from one sentence into the next (the phase of a
trembling voice, the seed of its breath), so that a sentence would sound different after another
one. Therefore each request is spoken in a fork of a process that has never spoken: equal requests,
equal samples. Choosing a voice happens after the fork too: espeak-ng 1.51 now and then speaks
garbage or crashes once it has changed voices often. Only the standard library is imported, which
keeps the fork at about a millisecond. RHVoice, SVOX Pico and festival are programs, run anew for
each sentence.
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
SYNCHRONOUS = 2  # a mode of espeak-ng: samples come back before the call ends
SECONDS = 30  # what takes longer hangs
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


def own_data(library: ctypes.CDLL, folder: str) -> str:
    """Fill `folder` with links to espeak-ng's data; returns where variants can be added."""
    reading, writing = os.pipe()
    child = os.fork()  # espeak-ng knows where its data is once it has started, and it starts once
    if child == 0:
        path = ctypes.c_char_p()
        if library.espeak_Initialize(SYNCHRONOUS, 0, None, 0) == ESPEAK_RATE:
            library.espeak_Info(ctypes.byref(path))
            os.write(writing, path.value or b"")
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading) as told:
        source = told.read()
    if not source:
        raise RuntimeError("espeak-ng does not start: is its data (espeak-ng-data) installed?")
    target = os.path.join(folder, "espeak-ng-data")
    for inner in ("", "voices", os.path.join("voices", "!v")):
        os.mkdir(os.path.join(target, inner))
        for name in os.listdir(os.path.join(source, inner)):
            if (inner, name) not in (("", "voices"), ("voices", "!v")):
                os.symlink(os.path.join(source, inner, name), os.path.join(target, inner, name))
    return os.path.join(target, "voices", "!v")


class Espeak:
    """libespeak-ng in its synchronous mode: samples come back through a callback."""

    def __init__(self) -> None:
        self.library = load("libespeak-ng.so.1", "espeak-ng")
        self.folder = tempfile.TemporaryDirectory(prefix="espeak-voices-")
        self.variants = own_data(self.library, self.folder.name)
        phoneme_events = 1
        data = self.folder.name.encode()
        if self.library.espeak_Initialize(SYNCHRONOUS, 0, data, phoneme_events) != ESPEAK_RATE:
            raise RuntimeError(f"espeak-ng does not start from {self.folder.name}")
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
        if request["settings"]:
            path = os.path.join(self.variants, request["variant"])
            with open(path, "w", encoding="ascii") as file:
                file.write(request["settings"])
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


class Program:
    """An engine that is a program, which writes a wav file."""

    program = ""
    packages = ""

    def __init__(self) -> None:
        if shutil.which(self.program) is None:
            raise RuntimeError(
                f"{self.program} is not installed (Debian and Ubuntu: apt install {self.packages})"
            )

    def command(self, request: dict, text: str, path: str) -> tuple[list[str], str]:
        """The command line that has `text` spoken into the file `path`, and what it reads."""
        raise NotImplementedError

    def speak(self, request: dict) -> Spoken:
        text = request["text"].replace("\\", " ").replace('"', " ")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "spoken.wav")
            command, given = self.command(request, text, path)
            done = subprocess.run(
                command, input=given.encode(), capture_output=True, timeout=SECONDS
            )
            if not os.path.exists(path):
                why = " ".join((done.stderr or done.stdout).decode(errors="replace").split())
                raise RuntimeError(
                    f"{self.program} does not speak with {request['name']}: {why} "
                    f"(Debian and Ubuntu: apt install {self.packages})"
                )
            with wave.open(path) as spoken:
                return spoken.getframerate(), spoken.readframes(spoken.getnframes()), []


class Festival(Program):
    """The program festival. Its statistical voice takes a speed but keeps its own pitch."""

    program = "festival"
    packages = "festival festvox-us-slt-hts"
    SPEED = 154  # words a minute of the voice left alone: it then takes espeak-ng's time at 154

    def command(self, request: dict, text: str, path: str) -> tuple[list[str], str]:
        return ["festival", "--pipe"], (
            f"(voice_{request['name']})"
            f'(set! speed (list (list "-r" {request["rate"] / self.SPEED})))'
            "(set! hts_engine_params (append hts_engine_params speed))"
            f'(set! utterance (utt.synth (Utterance Text "{text}")))'
            f'(utt.save.wave utterance "{path}" \'riff)'
        )


class RHVoice(Program):
    """The program RHVoice-test: statistical voices of English."""

    program = "RHVoice-test"
    packages = "rhvoice rhvoice-english, of Debian's non-free part"

    def command(self, request: dict, text: str, path: str) -> tuple[list[str], str]:
        rate = f"{max(50, 100 * request['rate'] / 160):.0f}"  # per cent; 100 is 160 words a minute
        pitch = f"{100 * 2 ** ((request['pitch'] - 50) / 100):.0f}"
        return [self.program, "-p", request["name"], "-r", rate, "-t", pitch, "-o", path], text


class Pico(Program):
    """The program pico2wave of SVOX Pico: one woman's voice for each of six accents."""

    program = "pico2wave"
    packages = "libttspico-utils, of Debian's non-free part"

    def command(self, request: dict, text: str, path: str) -> tuple[list[str], str]:
        rate = f"{100 * request['rate'] / 165:.0f}"
        pitch = f"{100 * 2 ** ((request['pitch'] - 50) / 100):.0f}"
        text = text.replace("&", " ").replace("<", " ")
        marked = f'<speed level="{rate}"><pitch level="{pitch}">{text}</pitch></speed>'
        return [self.program, "-l", request["name"], "-w", path, marked], ""


def write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def error(text: str) -> bytes:
    return json.dumps({"error": text}).encode() + b"\n"


def serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks; then stdin ends
    kinds = {
        "espeak": Espeak, "flite": Flite, "festival": Festival, "rhvoice": RHVoice, "pico": Pico,
    }  # fmt: skip
    engines: dict[str, Espeak | Flite | Program] = {}
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
            signal.alarm(2 * SECONDS)  # for the libraries: a program has its own limit
            try:
                rate, samples, events = engines[name].speak(request)
                about = {"rate": rate, "bytes": len(samples), "events": events}
                answer = json.dumps(about).encode() + b"\n" + samples
            except Exception as wrong:  # let go, it would clean up what is the parent's
                answer = error(str(wrong) or type(wrong).__name__)
            signal.alarm(0)
            write(answer)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            write(error(f"{name} failed (status {status}) on {request['text']!r}"))


if __name__ == "__main__":
    serve()
