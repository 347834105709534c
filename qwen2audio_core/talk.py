"""The conversation in a terminal: `qwen2audio chat`."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen2audio_core.assistant import Assistant, Turn
from qwen2audio_core.audio_files import source_name
from qwen2audio_core.errors import AudioError, InputError, PromptError
from qwen2audio_core.terminal import URLS, memory_line, printable

HELP = """\
/audio FILE     add a clip to your next turn (as often as you like)
/drop           take the clips of your next turn away again
/record         record one from the microphone, Enter ends it
/send           send the clips without a text
/system TEXT    another system prompt; the conversation begins anew
/retry          another answer to the last turn
/clear          forget the conversation
/save FILE      write the conversation as JSON, what was recorded beside it
/exit           leave (Ctrl-D too); Ctrl-C stops an answer"""

# Programs that record 16 kHz mono to a WAV file until they are interrupted.
RECORDERS = (
    ("arecord", "-q", "-f", "S16_LE", "-r", "16000", "-c", "1", "-t", "wav"),
    ("rec", "-q", "-r", "16000", "-c", "1", "-b", "16"),
)


class Talk:
    """One conversation in a terminal.

    ask reads a line, show writes a piece of the dialogue, complain a line that is not part of it.
    """

    def __init__(
        self,
        assistant: Assistant,
        options: dict[str, Any],
        system: str | None = None,
        ask: Callable[[str], str] = input,
        show: Callable[[str], None] = lambda text: print(text, end="", flush=True),
        complain: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ):
        self.chat = assistant.chat(system)
        self.options = options
        if tell := options.get("notice"):  # a long clip is split anew for every turn about it
            told: set[str] = set()

            def once(line: str) -> None:
                if line not in told:
                    told.add(line)
                    tell(line)

            self.options = options | {"notice": once}
        self.clips: list[str] = []  # for the next turn
        self.ask, self.show, self.complain = ask, show, complain
        self._recordings = tempfile.TemporaryDirectory(prefix="qwen2audio-")

    def run(self) -> None:
        """Take turns until the person leaves."""
        self.show("Type a question, or /help. Ctrl-C stops an answer, Ctrl-D leaves.\n")
        with self._recordings:
            while True:
                try:
                    line = self.ask(
                        f"[{len(self.clips)} clip{'s' * (len(self.clips) > 1)}] > "
                        if self.clips
                        else "> "
                    ).strip()
                except EOFError:
                    self.show("\n")
                    return
                except KeyboardInterrupt:
                    self.show("\n(/exit leaves)\n")
                    continue
                try:
                    if line.split()[:1] == ["/exit"]:
                        return
                    self.obey(line)
                except KeyboardInterrupt:
                    self.show(" [stopped]\n")
                except InputError as error:
                    clearing = isinstance(error, PromptError) and self.chat.messages
                    advice = ", or /clear forgets the conversation" if clearing else ""
                    if self.clips and isinstance(error, AudioError):
                        advice = ", or /drop takes the clips of this turn away"
                    self.complain(f"error: {printable(str(error))}{advice}")
                except (MemoryError, RuntimeError) as error:
                    full_memory = memory_line(error)
                    if full_memory is None:
                        raise
                    self.complain(f"error: {full_memory}")

    def obey(self, line: str) -> None:
        """Do what one line says: a command, or a turn."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line.startswith("/"):
            if line:
                self.turn(line)
        elif command == "/audio":
            self.add(rest)
        elif command == "/drop":
            self.clips.clear()
            self.show("Your next turn has no clip.\n")
        elif command == "/record":
            self.add(self.record())
        elif command == "/send":
            self.turn(None)
        elif command == "/system":
            self.chat.clear()
            self.chat.system = rest or None
            self.show("The conversation begins anew.\n")
        elif command == "/retry":
            self.answer(self.chat.retry(**self.options))
        elif command == "/clear":
            self.chat.clear()
            self.clips.clear()
            self.show("Forgotten.\n")
        elif command == "/save":
            self.save(rest)
        elif command == "/help":
            self.show(HELP + "\n")
        else:
            raise InputError(f"unknown command {command}, /help lists them")

    def add(self, file: str) -> None:
        if not file:
            raise InputError("/audio needs a file, for example /audio question.wav")
        name = file_name(file)
        if not name.startswith(URLS) and not os.path.isfile(name):
            asked = " " in file and os.path.isfile(file.split(" ")[0])
            hint = "; the question goes on a line of its own" if asked else ""
            what = "is a folder" if os.path.isdir(name) else f"no such file{hint}"
            raise InputError(f"{source_name(name)}: {what}")
        self.clips.append(name)
        self.show(f"{source_name(name)} goes with your next turn.\n")

    def turn(self, text: str | None) -> None:
        # The clips are given up only once they could be read, so that a slip costs nothing.
        turn = self.chat.stream(text, list(self.clips), **self.options)
        self.clips.clear()
        self.answer(turn)

    def answer(self, turn: Turn) -> None:
        try:
            for piece in turn:
                self.show(printable(piece))
        except KeyboardInterrupt:
            self.show(" [stopped]")
        self.show("\n")

    def record(self) -> str:
        """Record until Enter is pressed; returns the file."""
        command = next((c for c in RECORDERS if shutil.which(c[0])), None)
        if command is None:
            raise InputError("no recorder found: install arecord (alsa-utils) or rec (sox)")
        try:
            handle, path = tempfile.mkstemp(".wav", dir=self._recordings.name)
            os.close(handle)
            process = subprocess.Popen([*command, path], stderr=subprocess.PIPE, text=True)
        except OSError as error:
            raise InputError(f"{command[0]} cannot record: {error.strerror}") from error
        try:
            self.ask("Recording, Enter ends it ")
        except EOFError:
            pass
        finally:
            early = process.poll()
            process.send_signal(signal.SIGINT)
            _, complaint = process.communicate()
        if early is not None:
            reason = (complaint.strip() or "it ended at once").splitlines()[0]
            raise InputError(f"{command[0]} cannot record: {reason}")
        return path

    def save(self, file: str) -> None:
        if not file:
            raise InputError("/save needs a file, for example /save talk.json")
        target = os.path.abspath(file_name(file))
        shown = source_name(target)
        copies: dict[str, str] = {}  # recording, which is deleted at the end -> its copy
        messages = []
        for message in self.chat.messages:
            content = message["content"]
            if isinstance(content, list):
                content = [dict(item) for item in content]
                for item in content:
                    if item["type"] != "audio" or item["audio"].startswith(URLS):
                        continue
                    clip = item["audio"] = os.path.abspath(item["audio"])
                    if os.path.dirname(clip) == os.path.abspath(self._recordings.name):
                        copy = f"{os.path.splitext(target)[0]}-{len(copies) + 1}.wav"
                        item["audio"] = copies.setdefault(clip, copy)
            messages.append({**message, "content": content})
        whole = {"system": self.chat.system, "messages": messages}
        for place in (target, *copies.values()):
            if os.path.lexists(place):
                raise InputError(f"{source_name(place)} exists already: give another name")
        begun: list[str] = []
        try:
            text = (json.dumps(whole, ensure_ascii=False, indent=2) + "\n").encode()
            for clip, copy in copies.items():
                begun.append(copy)
                shutil.copyfile(clip, copy)
            begun.append(target)
            Path(target).write_bytes(text)
        except BaseException as error:
            for place in begun:
                with suppress(OSError, ValueError):
                    os.remove(place)
            if not isinstance(error, (OSError, ValueError)):
                raise
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{shown}: cannot write it ({reason})") from error
        self.show(f"Written to {shown}.\n")


def file_name(text: str) -> str:
    """The file that was typed, or dragged into the terminal, which quotes or escapes its name."""
    try:
        words = shlex.split(text)
    except ValueError:  # a lone apostrophe
        words = []
    plain = len(words) != 1 or os.path.isfile(text)
    return os.path.expanduser(text if plain else words[0])
