"""The small interface: load a checkpoint, then ask, stream, converse, or answer a batch.

Everything here is put together from the parts below it. People who change the model use those:

    prompt = chat.encode(messages, tokenizer)      turns and clips to ids
    batch = chat.collate([prompt], pad_id, device=device)  ids and log-mels, padded
    logits = model(batch.ids, batch.mel, batch.conv_frames, batch.attention_mask)
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from qwen2audio_core import backends, chat, hub, tiny, weights
from qwen2audio_core.chat import Batch, Long, Prompt
from qwen2audio_core.errors import CheckpointError, InputError, inside, warn
from qwen2audio_core.generate import Generation, likelihoods
from qwen2audio_core.linear import Linear
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.packed_linear import why_not_packed
from qwen2audio_core.quantize import SCHEMES, Scheme
from qwen2audio_core.reuse import Fingerprint
from qwen2audio_core.sampling import Likelihood, Settings, check_whole
from qwen2audio_core.tokenizer import TextStream, Tokenizer

Message = dict[str, Any]
ENCODING = ("system", "long", "notice", "continue_last")  # options of Assistant.encode


@dataclass(repr=False, eq=False)
class Reply:
    """One answer, and what it took."""

    prompt: Prompt
    text: str = ""
    ids: list[int] = field(default_factory=list)  # with the end token, if the model wrote one
    finish_reason: str = ""  # "stop": end token or stop string; "length": max_new_tokens or context
    seconds: dict[str, float] = field(default_factory=dict)  # encode, prefill, decode of its batch
    logprobs: list[Likelihood] = field(default_factory=list)  # of each id, where asked for
    reused: int = 0  # ids of the prompt that the turn before had read

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:  # short: the ids and the prompt's log-mels fill screens
        reason = self.finish_reason or "not finished"
        return f"<Reply {self.text!r}, {len(self.ids)} tokens, {reason}>"


class Stream:
    """Answers while they are written. Iterate once over it or over `events`; `replies` fills up.

    for piece in stream              the pieces of text of a single answer
    for row, piece in stream.events  those of several, as they come
    """

    def __init__(self, run: Generation, replies: list[Reply], writers: list["StopWriter"]):
        self.replies = replies
        self.run = run
        self._writers = writers

    def __iter__(self) -> Iterator[str]:
        return (piece for _, piece in self.events)

    @property
    def reply(self) -> Reply:
        """The first answer."""
        return self.replies[0]

    @property
    def events(self) -> Iterator[tuple[int, str]]:
        while self.run.running:
            for row, token in self.run.step():
                writer, answer, reply = (
                    self._writers[row],
                    self.run.answers[row],
                    self.replies[row],
                )
                piece = writer.push(token)
                if answer.finish_reason or writer.stopped:
                    piece += writer.finish()
                if writer.stopped:
                    self.run.finish(row)
                reply.text += piece
                reply.ids, reply.finish_reason = answer.ids, answer.finish_reason
                reply.logprobs = answer.logprobs
                reply.seconds = self.run.seconds
                if piece:
                    yield row, piece

    def finished(self) -> list[Reply]:
        """Run to the end; returns all answers."""
        for _ in self.events:
            pass
        return self.replies


class StopWriter:
    """Ids of one answer to text that is safe to show: whole characters, no stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] | None):
        self.stopped = False
        several = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(several, Sequence) or not all(isinstance(one, str) for one in several):
            raise InputError(f"stop is {stop!r:.60}, it must be a string or several")
        self._stop = tuple(several)
        if not all(self._stop):
            raise InputError("a stop string is empty: it would end every answer at once")
        self._text = TextStream(tokenizer)
        self._held = ""  # might be the beginning of a stop string
        self._shown = 0  # characters

    @property
    def reach(self) -> int:
        """Characters of the answer so far, those held back among them."""
        return self._shown + len(self._held)

    def push(self, token: int) -> str:
        """The text that this id makes certain."""
        return self._release(self._text.push(token))

    def finish(self) -> str:
        """What was still held back."""
        piece = self._release(self._text.finish()) + self._held
        self._shown += len(self._held)
        self._held = ""
        return piece

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped, sure = True, min(found)
            self._held = ""
        else:
            sure = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
            self._held = text[sure:]
        self._shown += sure
        return text[:sure]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Assistant:
    """A model with its tokenizer and its published generation settings.

    Options of every method that answers:

        greedy, temperature, top_k, top_p, repetition_penalty, max_new_tokens, min_new_tokens
                  change the checkpoint's settings; giving temperature, top_k or top_p samples
        seed      makes sampling repeatable, for the same prompts in the same batch; engine.py draws
                  for each prompt alone
        stop      a string, or several, that end an answer; they are not part of it
        logprobs  also give each id's Likelihood, with so many alternatives
        system    replaces the published system prompt
        long      what to do with a clip of more than 30 s: "split", "cut" or "error"
        continue_last  the last turn is the assistant's, and the answer goes on with it
        notice    called with one line for everything worth knowing, such as a split; without it
                  Python's warnings say it
    """

    def __init__(self, model: Qwen2Audio, tokenizer: Tokenizer, settings: Settings, name: str = ""):
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.name = name

    @property
    def device(self) -> torch.device:
        return self.model.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.language_model.model.embed_tokens.weight.dtype

    def ask(self, text: str | None = None, audio: Any = None, **options: Any) -> Reply:
        """Answer one question.

        text   the question; None where the audio itself is the instruction (voice chat)
        audio  a path, URL, bytes or file, an (array, rate) pair, or a list of these
        """
        return self.stream(text, audio, **options).finished()[0]

    def stream(self, text: str | None = None, audio: Any = None, **options: Any) -> Stream:
        """Like `ask`, but returns the Stream of the answer's pieces."""
        return self.stream_messages([user_turn(text, audio)], **options)

    def stream_messages(
        self, messages: Sequence[Message], latest: "Latest | None" = None, **options: Any
    ) -> Stream:
        """Answer a conversation, [{"role": ..., "content": ...}, ...] as chat.encode takes it.

        latest  keeps what was read, for the next turn; None does not
        """
        encoding = {key: options.pop(key) for key in ENCODING if key in options}
        prompt = self.encode(messages, **encoding)
        if latest is None:
            return self.stream_prompts([prompt], **options)
        return latest.answer(self, prompt, **options)

    def complete(self, text: str, audio: Any = None, **options: Any) -> Reply:
        """Continue a raw prompt, as the base model is used: no template, placeholders in the text.

        For example "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:".
        """
        encoding = {key: options.pop(key) for key in ("long", "notice") if key in options}
        prompt = self.encode_raw(text, audio, **encoding)
        return self.stream_prompts([prompt], **options).finished()[0]

    def batch(
        self, conversations: Sequence[Sequence[Message]], answers: int = 1, **options: Any
    ) -> list[list[Reply]]:
        """Answer conversations at once, each `answers` times: replies[conversation][answer].

        Where one cannot be read, none is answered, and the error tells its number.
        """
        if not conversations:
            return []
        encoding = {key: options.pop(key) for key in ENCODING if key in options}
        prompts = []
        for i, messages in enumerate(conversations):
            try:
                prompts.append(self.encode(messages, **encoding))
            except InputError as error:
                raise inside(f"conversations[{i}]", error) from error
        replies = self.stream_prompts(prompts, answers=answers, **options).finished()
        return [replies[i : i + answers] for i in range(0, len(replies), answers)]

    def score(self, prompt: Prompt, answers: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """How likely the model finds answers that it did not write: for each, the natural logarithm
        of every token's probability; their sum is that of the answer. The prompt is read once.

        prompt   from `encode` or `encode_raw`
        answers  texts, in which special tokens are tokens (a last "<|im_end|>" has the end weighed
                 too), or ids
        """
        if isinstance(answers, str):
            raise InputError(f"answers is {answers!r:.60}; give a list of them")
        texts = [
            self.tokenizer.encode(one, special=True) if isinstance(one, str) else list(one)
            for one in answers
        ]
        return likelihoods(self.model, self._collated([prompt]), texts)

    def chat(self, system: str | None = None) -> "Chat":
        """Begin a conversation that remembers its turns and clips."""
        return Chat(self, system)

    def encode(
        self,
        messages: Sequence[Message],
        system: str | None = None,
        long: Long = "split",
        notice: Callable[[str], None] | None = None,
        continue_last: bool = False,
    ) -> Prompt:
        """Turns and clips to one prompt, with this checkpoint's tokenizer and limits."""
        prompt = chat.encode(
            messages, self.tokenizer, system=system, long=long, continue_last=continue_last
        )
        return self._checked(prompt, notice)

    def encode_raw(
        self,
        text: str,
        audio: Any = None,
        long: Long = "error",
        notice: Callable[[str], None] | None = None,
    ) -> Prompt:
        """A raw prompt and its clips to one prompt."""
        return self._checked(
            chat.encode_raw(text, clip_list(audio), self.tokenizer, long=long), notice
        )

    def _collated(self, prompts: Sequence[Prompt]) -> Batch:
        bins, pad = self.model.config.audio.num_mel_bins, self.settings.pad_token_id
        return chat.collate(prompts, pad, num_mel_bins=bins, device=self.device)

    def _checked(self, prompt: Prompt, notice: Callable[[str], None] | None) -> Prompt:
        chat.check_length(prompt, self.model.config.text.max_position_embeddings)
        for line in prompt.notices:
            (notice or warn)(line)
        return prompt

    def stream_prompts(
        self,
        prompts: Sequence[Prompt],
        answers: int = 1,
        seed: int | None = None,
        stop: str | Sequence[str] | None = (),
        logprobs: int | None = None,
        after: Stream | None = None,
        **changes: Any,
    ) -> Stream:
        """Answer encoded prompts in one batch: all answers to the first, then to the second, ...

        after  as in generate.Generation; Latest sees to it
        """
        settings = change(self.settings, **changes)
        if check_whole("answers", answers, 1) > 1 and not settings.do_sample:
            warn(f"greedy decoding writes the same answer {answers} times: give a temperature")
        writers = [StopWriter(self.tokenizer, stop) for _ in range(len(prompts) * answers)]
        before = None if after is None else after.run
        batch = self._collated(prompts)
        run = Generation(self.model, batch, settings, answers, seed, logprobs, before)
        rows = range(len(run.answers))
        replies = [Reply(prompts[row // answers], reused=run.reused) for row in rows]
        return Stream(run, replies, writers)


class Latest:
    """The last answer, kept for the next one: what both prompts begin with is not read again, as
    long as the model is what it was. Until then, or until `forget`, its keys and values stay in
    memory: those of the prompt and of max_new_tokens, 0.5 MB a token in the published shape and
    bfloat16. One thread may answer while others forget.
    """

    def __init__(self) -> None:
        self._kept: tuple[Stream, Fingerprint] | None = None
        self._forgotten = 0  # times
        self._lock = threading.Lock()

    def answer(self, assistant: Assistant, prompt: Prompt, **options: Any) -> Stream:
        """Assistant.stream_prompts, for one prompt."""
        with self._lock:
            kept, self._kept = self._kept, None  # should this fail, the next try has its memory
            forgotten = self._forgotten
        now = Fingerprint(assistant.model)
        before = kept[0] if kept is not None and kept[1].is_of(now) else None
        del kept
        stream = None
        try:
            stream = assistant.stream_prompts([prompt], after=before, **options)
        except RuntimeError as error:
            full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
            if before is None or not full:
                raise
        if stream is None:  # there is no room for both
            del before
            stream = assistant.stream_prompts([prompt], **options)
        with self._lock:
            if forgotten == self._forgotten:
                self._kept = stream, now
        return stream

    def forget(self) -> None:
        """Give its memory back."""
        with self._lock:
            self._kept = None
            self._forgotten += 1


class Chat:
    """A conversation. `messages` is the whole of it, in the form that chat.encode takes.

    A turn reads what is new since the last one (Latest); Reply.reused tells how much was not.
    """

    def __init__(self, assistant: Assistant, system: str | None = None):
        self.assistant = assistant
        self.system = system
        self.messages: list[Message] = []
        self.latest = Latest()

    def say(self, text: str | None = None, audio: Any = None, **options: Any) -> Reply:
        """Take a turn; returns the answer and remembers both."""
        stream = self.stream(text, audio, **options)
        for _ in stream:
            pass
        return stream.reply

    def stream(self, text: str | None = None, audio: Any = None, **options: Any) -> "Turn":
        """Take a turn and watch the answer; one that is broken off is kept as far as it came."""
        return Turn(self, self.messages, user_turn(text, audio), options)

    def retry(self, **options: Any) -> "Turn":
        """Answer the last turn again; the answer it had is forgotten."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not turns:
            raise InputError("there is no turn to try again")
        last = turns[-1]
        return Turn(self, self.messages[:last], self.messages[last], options)

    def clear(self) -> None:
        """Forget every turn; the system prompt stays."""
        self.messages.clear()
        self.latest.forget()


class Turn:
    """The answer to one turn of a Chat as it is written. Iterate once over its pieces."""

    def __init__(
        self, chat: Chat, before: list[Message], message: Message, options: dict[str, Any]
    ):
        options.setdefault("system", chat.system)
        self._chat = chat
        self._messages = [*before, message]
        self._begun = False
        self._stream = chat.assistant.stream_messages(self._messages, chat.latest, **options)

    @property
    def reply(self) -> Reply:
        return self._stream.reply

    def __iter__(self) -> Iterator[str]:
        if self._begun:
            return
        self._begun, failed = True, False
        try:
            yield from self._stream
        except Exception:
            failed = True
            raise
        finally:
            # Of what failed at once the conversation knows nothing.
            if self.reply.ids or not failed:
                answer = {"role": "assistant", "content": self.reply.text}
                self._chat.messages[:] = [*self._messages, answer]


def load(
    model: str = "tiny",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    pack: bool | None = None,
    quantize: Literal["int8", "int4"] | Scheme | None = None,
) -> Assistant:
    """Load a checkpoint.

    model   a hub id ("Qwen/Qwen2-Audio-7B-Instruct"), a folder in the published layout, "tiny":
            the small trained model that ships with the package, or "random": an untrained one,
            made on the spot, whose words mean nothing
    device  None takes the GPU where there is one
    dtype   None keeps the checkpoint's own, bfloat16 for the published ones
    pack    keep a second copy of the linear layers' weights in the order that a CPU multiplies them
            in, which makes answers faster: True, False, or None where it pays and memory allows
    quantize  "int8" or "int4": the language model in so many bits a weight, made while it is read;
            or a quantize.Scheme. A folder that is quantised already needs no word
    """
    weights.check_dtype(dtype)
    folder = find(model)
    scheme = pick_scheme(quantize)
    place = pick_device(device)
    loaded = weights.load_model(folder, device=place, dtype=dtype, scheme=scheme)
    if pack or (pack is None and fits_packed(loaded)):
        backends.use(loaded, linear="packed")
    tokenizer = Tokenizer.from_folder(folder)
    settings = weights.read_settings(folder)
    check_fit(folder, loaded, tokenizer, settings)
    return Assistant(loaded, tokenizer, settings, model)


def check_fit(folder: Path, model: Qwen2Audio, tokenizer: Tokenizer, settings: Settings) -> None:
    """Raise CheckpointError if tokenizer, settings and weights are not of one model."""
    words, token = model.config.text.vocab_size, model.config.audio_token_id
    if tokenizer.id_of("<|AUDIO|>") != token:
        raise CheckpointError(
            f"{folder}: <|AUDIO|> is {tokenizer.id_of('<|AUDIO|>')} in the tokenizer and {token} in"
            " config.json; the files are of different models"
        )
    highest = max(len(tokenizer) - 1, settings.pad_token_id, *settings.eos_token_ids)
    if highest >= words:
        if not (folder / "generation_config.json").exists():  # the published tokens are taken
            raise CheckpointError(
                f"{folder}: has no generation_config.json, and the published model's end token"
                f" {highest} is beyond the {words} of these weights: fetch the checkpoint again"
            )
        raise CheckpointError(
            f"{folder}: tokens reach {highest}, the weights know {words}; the files are of"
            " different models"
        )


def fits_packed(model: Qwen2Audio) -> bool:
    """Whether packing the linear layers pays here and there is memory for the packed copy."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    if why_not_packed(layers[0].weight):
        return False
    needed = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return False
    group = Path("/sys/fs/cgroup")
    try:  # a container's own limit
        allowed = int((group / "memory.max").read_text())
        free = min(free, allowed - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such limit
        pass
    return free > 1.2 * needed


def find(model: str, weights: bool = True) -> Path:
    """Folder of a checkpoint by hub id, folder, "tiny" or "random"; `weights` as in hub.find."""
    if model == "tiny":
        return tiny.trained()
    if model == "random":
        return tiny.folder()
    return hub.find(model, weights=weights)


def pick_scheme(quantize: str | Scheme | None) -> Scheme | None:
    """How to quantise, by name."""
    if quantize is None or isinstance(quantize, Scheme):
        return quantize
    if quantize not in SCHEMES:
        raise InputError(f"quantize is {quantize!r}, choose {' or '.join(map(repr, SCHEMES))}")
    return SCHEMES[quantize]


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for, or the best one here: cuda, then mps, then cpu."""
    if device is not None:
        try:
            found = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0].split(". ")[0]  # PyTorch lists every device it knows
            raise InputError(f"device {str(device)!r} cannot be used: {why:.200}") from error
        if found.type not in ("cpu", "cuda", "mps"):
            raise InputError(f"device {str(device)!r} cannot be used: expected cpu, cuda or mps")
        return found
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def change(settings: Settings, greedy: bool | None = None, **changes: Any) -> Settings:
    """Settings with some values replaced; None leaves a value as it is."""
    changes = {name: value for name, value in changes.items() if value is not None}
    unknown = changes.keys() - Settings.__dataclass_fields__.keys()
    if unknown:
        raise InputError(f"unknown option {sorted(unknown)[0]!r}")
    drawing = changes.keys() & {"temperature", "top_k", "top_p"}
    if greedy and drawing:
        raise InputError(f"greedy decoding draws nothing: leave out {sorted(drawing)[0]}")
    if greedy is not None or drawing:
        changes.setdefault("do_sample", not greedy)
    return replace(settings, **changes)


def clip_list(audio: Any) -> list[Any]:
    """One clip or a list of clips, to a list. A pair (array, rate) is one clip."""
    if audio is None:
        return []
    return list(audio) if isinstance(audio, list) else [audio]


def user_turn(text: str | None, audio: Any = None) -> Message:
    """A user's turn as the published examples write it: the clips first, then the text."""
    items: list[Message] = []
    for clip in clip_list(audio):
        if hasattr(clip, "read"):  # it can be read once, a conversation is read at every turn
            clip = clip.read()
        if isinstance(clip, tuple):
            if len(clip) != 2 or isinstance(clip[1], (str, bytes, Path)):
                raise InputError("a clip in a tuple is (samples, rate); put several into a list")
            source, rate = clip
            items.append({"type": "audio", "audio": source, "sampling_rate": rate})
        else:
            items.append({"type": "audio", "audio": clip})
    if text:
        items.append({"type": "text", "text": text})
    if not items:
        raise InputError("nothing was asked: give a text, a clip, or both")
    return {"role": "user", "content": items}
