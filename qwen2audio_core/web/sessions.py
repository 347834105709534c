"""A conversation for every open page, its clips, and the limits that hold for all of them.

A page is known by the random name that its browser made up when it was opened. Nothing of one
conversation is reachable through another's name; its files lie in a folder that nobody can guess.
"""

import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen2audio_core import audio
from qwen2audio_core.assistant import Assistant, Latest, Message, Reply, change, user_turn
from qwen2audio_core.errors import AudioError, InputError, PromptError
from qwen2audio_core.frontend import SAMPLE_RATE, clip_lengths
from qwen2audio_core.web import pictures
from qwen2audio_core.web.words import words
from qwen2audio_core.web.worker import Job, Worker

ALTERNATIVES = 5  # words that are kept beside each one of an answer, to look at


@dataclass(frozen=True)
class Limits:
    """What one page, and all of them together, may use."""

    upload_bytes: int = 50 * 2**20
    seconds: float = 300.0  # of the clips of one turn, together
    clips: int = 8  # of one turn
    waiting: int = 32  # answers in the line
    pages: int = 200  # conversations that are remembered
    closed: float = 300.0  # s after its page was left that one is forgotten
    idle: float = 4 * 3600.0  # s after anything happened in it, with its page open
    upload: float = 300.0  # s after which an upload is removed; what is used of it is a copy


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip as the model hears it."""

    name: str
    pieces: list[Tensor]  # (N,) 16 kHz, each of at most 30 s
    wav: Path
    picture: Path

    @property
    def seconds(self) -> float:
        return sum(len(piece) for piece in self.pieces) / SAMPLE_RATE

    @property
    def audio_tokens(self) -> int:
        return sum(clip_lengths(len(piece)).audio_tokens for piece in self.pieces)


@dataclass
class Turn:
    """What was asked, and the answer as far as it is written."""

    text: str
    clips: list[Clip]
    answer: str = ""
    stopped: bool = False
    reply: Reply | None = None  # once the model has begun

    def messages(self) -> list[Message]:
        """Both sides of it, as chat.encode takes them."""
        pieces = [(piece, SAMPLE_RATE) for clip in self.clips for piece in clip.pieces]
        return [
            user_turn(self.text, pieces),
            {"role": "assistant", "content": self.answer},
        ]


class Session:
    """One page: its turns, the clips that wait for the next one, and the answer being written."""

    def __init__(
        self,
        assistant: Assistant,
        worker: Worker,
        folder: Path,
        limits: Limits,
        latest: Latest,
    ):
        self.assistant = assistant
        self.latest = latest
        self.worker = worker
        self.folder = folder
        self.limits = limits
        self.language = "en"
        self.turns: list[Turn] = []
        self.clips: list[Clip] = []
        self.job: Job | None = None
        self.look: Job | None = None  # closely, at the last answer
        self.recordings = 0
        self.used = time.monotonic()
        self.left: float | None = None  # when its page was closed
        self._made = 0
        self._lock = threading.RLock()

    @property
    def words(self) -> dict[str, str]:
        return words(self.language)

    @property
    def busy(self) -> bool:
        """Whether an answer is being written or waited for."""
        return self.job is not None and not (self.job.done or self.job.stopped)

    def add(self, file: str | Path, name: str | None = None) -> list[str]:
        """Read a clip for the next turn. Returns notices; raises AudioError, InputError."""
        name = name or Path(file).name
        with self._lock:
            room = self.limits.seconds - sum(clip.seconds for clip in self.clips)
            if len(self.clips) >= self.limits.clips:
                raise InputError(self.words["too many clips"].format(self.limits.clips, name))
        with suppress(OSError):
            if Path(file).stat().st_size > self.limits.upload_bytes:
                raise AudioError(self.words["too large"].format(self.limits.upload_bytes >> 20))
        try:
            whole = audio.load(Path(file), name=name, max_seconds=max(room, 0.0))
        except AudioError as error:
            raise AudioError(error.remote) from error
        notices: list[str] = []
        pieces = audio.split(whole, name=name, notice=notices.append)
        with self._lock:
            if len(self.clips) >= self.limits.clips:
                raise InputError(self.words["too many clips"].format(self.limits.clips, name))
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made += 1
            place = self.folder / f"clip-{self._made}"
            clip = Clip(
                name,
                [piece.waveform for piece in pieces],
                place.with_suffix(".wav"),
                place.with_suffix(".png"),
            )
            pictures.write_wav(clip.wav, clip.pieces)
            clip.picture.write_bytes(pictures.spectrogram(clip.pieces))
            self.clips.append(clip)
        return notices

    def remove(self, wav: str) -> None:
        """Take back a clip that waits for the next turn, by the name of its file."""
        with self._lock:
            for clip in [clip for clip in self.clips if clip.wav.name == wav]:
                self.clips.remove(clip)
                clip.wav.unlink(missing_ok=True)
                clip.picture.unlink(missing_ok=True)

    def ask(self, text: str, system: str | None = None, **options: Any) -> Turn:
        """Take a turn with the waiting clips; its answer is written in the worker's thread.

        options  as in Assistant.stream_prompts
        errors   InputError: nothing asked, an answer still running, too long for the model, or
                 options out of range; everything is then as it was before
        """
        with self._lock:
            self._begin(Turn(text.strip(), self.clips), self.turns, self.clips, system, options)
            self.clips = []
            return self.turns[-1]

    def retry(self, system: str | None = None, **options: Any) -> Turn:
        """Answer the last turn again. Errors as in `ask`."""
        with self._lock:
            if not self.turns:
                raise InputError(self.words["nothing to retry"])
            last = self.turns[-1]
            self._begin(Turn(last.text, last.clips), self.turns[:-1], None, system, options)
            return self.turns[-1]

    def edit(self) -> str:
        """Take the last turn back: its clips wait again, its answer is forgotten. Its text."""
        with self._lock:
            self._must_be_free()
            if not self.turns:
                raise InputError(self.words["nothing to edit"])
            last = self.turns.pop()
            self.clips = [*last.clips, *self.clips]
            return last.text

    def stop(self) -> None:
        """End the answer where it is. What was written stays."""
        with self._lock:
            if self.look is not None:
                self.look.stop()
            if self.busy and self.job is not None:
                self.job.stop()
                self.turns[-1].stopped = True

    def clear(self) -> None:
        """Forget everything and remove the files."""
        with self._lock:
            self.stop()
            self.turns, self.clips = [], []
            self.latest.forget()  # whosever it is
            shutil.rmtree(self.folder, ignore_errors=True)

    def _must_be_free(self) -> None:
        if self.busy:
            raise InputError(self.words["still answering"])

    def _begin(
        self,
        turn: Turn,
        before: list[Turn],
        clips: list[Clip] | None,
        system: str | None,
        options: dict[str, Any],
    ) -> None:
        # clips: what waited before it, to be put back with the text should the model fail
        self._must_be_free()
        if not turn.text and not turn.clips:
            raise InputError(self.words["nothing asked"])
        given = dict(options)
        seed = given.pop("seed", None)
        if seed is not None and not 0 <= seed < 2**63:
            raise InputError(f"seed is {seed}, it must be 0 to {2**63 - 1}")
        change(self.assistant.settings, **given)  # raises before anything is changed
        messages = [message for old in before for message in old.messages()]
        try:
            prompt = self.assistant.encode([*messages, turn.messages()[0]], system=system)
        except PromptError as error:
            if before and len(turn.text) < 1000 and not turn.clips:  # of what is it too much?
                raise InputError(self.words["full"]) from error
            raise
        was = self.turns

        def work(job: Job) -> None:
            try:
                stream = self.latest.answer(
                    self.assistant, prompt, seed=seed, logprobs=ALTERNATIVES, **given
                )
                turn.reply = stream.reply
                for piece in stream:
                    with self._lock:
                        if job.stopped:  # what comes too late is not part of the conversation
                            break
                        turn.answer += piece
            except Exception:
                with self._lock:
                    if self.turns and self.turns[-1] is turn:
                        self.turns = was
                        self.clips = [*(clips or []), *self.clips]
                raise

        self.turns = [*before, turn]
        if self.look is not None:
            self.look.stop()
        try:
            self.job = self.worker.submit(work)
        except InputError:
            self.turns = was
            raise


@dataclass
class Sessions:
    """All pages by their names.

    folder  for their files, and where Gradio puts uploads
    """

    assistant: Assistant
    worker: Worker
    folder: Path
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._latest = Latest()  # one for all pages: memory for one conversation
        self._known: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, name: str | None) -> Session:
        """The conversation of a page, made where there is none yet."""
        if not name:
            raise InputError("the request does not say which page it comes from")
        with self._lock:
            session = self._known.get(name)
            if session is None:
                if len(self._known) >= self.limits.pages:
                    self._forget(min(self._known, key=lambda page: self._known[page].used))
                folder = self.folder / f"page-{secrets.token_urlsafe(16)}"
                session = Session(self.assistant, self.worker, folder, self.limits, self._latest)
                self._known[name] = session
            session.used, session.left = time.monotonic(), None
            return session

    def leave(self, name: str | None) -> None:
        """Its page was closed, or lost its connection: free the model, keep the rest a while."""
        with self._lock:
            session = self._known.get(name or "")
            if session is not None:
                session.left = time.monotonic()
                session.stop()

    def sweep(self) -> None:
        """Forget conversations whose time is over, and remove uploads that were read."""
        now = time.monotonic()
        with self._lock:
            for name, session in list(self._known.items()):
                left = session.left is not None and now - session.left > self.limits.closed
                if left or (not session.busy and now - session.used > self.limits.idle):
                    self._forget(name)
            own = {session.folder for session in self._known.values()}
        for file in self._files():
            with suppress(OSError):
                old = time.time() - file.stat().st_mtime > self.limits.upload
                if old and not any(folder in file.parents for folder in own):
                    file.unlink()
                    if file.parent != self.folder:
                        file.parent.rmdir()

    def close(self) -> None:
        """Forget all and remove every file."""
        with self._lock:
            for name in list(self._known):
                self._forget(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def stored(self) -> int:
        """Bytes of all files that are kept."""
        total = 0
        for file in self._files():
            with suppress(OSError):
                total += file.stat().st_size
        return total

    def __len__(self) -> int:
        return len(self._known)

    def _forget(self, name: str) -> None:
        self._known.pop(name).clear()

    def _files(self) -> Iterator[Path]:
        with suppress(OSError):
            yield from [file for file in self.folder.rglob("*") if file.is_file()]
