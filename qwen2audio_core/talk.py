"""The conversation in a terminal: `qwen2audio chat`."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2audio_core.assistant import Assistant, Turn
from qwen2audio_core.errors import InputError

HELP = """\
/audio FILE     add a clip to your next turn (as often as you like)
/record         record one from the microphone, Enter ends it
/send           send the clips without a text
/system TEXT    another system prompt; the conversation begins anew
/retry          another answer to the last turn
/clear          forget the conversation
/save FILE      write the conversation as JSON
/exit           leave (Ctrl-D too); Ctrl-C stops an answer"""

# Programs that record 16 kHz mono to a WAV file until they are interrupted.
RECORDERS = (
    ("arecord", "-q", "-f", "S16_LE", "-r", "16000", "-c", "1", "-t", "wav"),
    ("rec", "-q", "-r", "16000", "-c", "1", "-b", "16"),
)


class Talk:
    """One conversation in a terminal. `ask` reads a line, `show` writes a piece of text."""

    def __init__(
        self,
        assistant: Assistant,
        options: dict[str, Any],
        system: str | None = None,
        ask: Callable[[str], str] = input,
        show: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    ):
        self.chat = assistant.chat(system)
        self.options = options
        self.clips: list[str] = []  # for the next turn
        self.ask, self.show = ask, show
        self._recordings = tempfile.TemporaryDirectory(prefix="qwen2audio-")

    def run(self) -> None:
        """Take turns until the person leaves."""
        self.show("Type a question, or /help. Ctrl-C stops an answer, Ctrl-D leaves.\n")
        with self._recordings:
            while True:
                try:
                    line = self.ask(f"[{len(self.clips)} clips] > " if self.clips else "> ").strip()
                except EOFError:
                    self.show("\n")
                    return
                except KeyboardInterrupt:
                    self.show("\n(/exit leaves)\n")
                    continue
                try:
                    if line == "/exit":
                        return
                    self.obey(line)
                except InputError as error:
                    self.show(f"error: {error}\n")

    def obey(self, line: str) -> None:
        """Do what one line says: a command, or a turn."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line.startswith("/"):
            if line:
                self.turn(line)
        elif command == "/audio":
            self.add(rest)
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
        # People drag files into a terminal, which quotes their names or escapes blanks.
        name = os.path.expanduser(file.strip("'\"").replace("\\ ", " "))
        if not name.startswith(("http://", "https://")) and not Path(name).is_file():
            raise InputError(f"{name}: no such file")
        self.clips.append(name)
        self.show(f"{name} goes with your next turn.\n")

    def turn(self, text: str | None) -> None:
        # The clips are given up only once they could be read, so that a slip costs nothing.
        turn = self.chat.stream(text, list(self.clips), **self.options)
        self.clips.clear()
        self.answer(turn)

    def answer(self, turn: Turn) -> None:
        try:
            for piece in turn:
                self.show(piece)
        except KeyboardInterrupt:
            self.show(" [stopped]")
        self.show("\n")

    def record(self) -> str:
        """Record until Enter is pressed; returns the file."""
        command = next((c for c in RECORDERS if shutil.which(c[0])), None)
        if command is None:
            raise InputError("no recorder found: install arecord (alsa-utils) or rec (sox)")
        handle, path = tempfile.mkstemp(".wav", dir=self._recordings.name)
        os.close(handle)
        process = subprocess.Popen([*command, path], stderr=subprocess.PIPE, text=True)
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
        content = {"system": self.chat.system, "messages": self.chat.messages}
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        try:
            Path(file).expanduser().write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file}: cannot write it ({error.strerror})") from error
        self.show(f"Written to {file}.\n")
