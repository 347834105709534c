"""Conversations with sound to token ids, and ids with mels to a batch.

    messages --template--> ids, each clip's placeholder already repeated once per audio token
    prompts  --collate-->  ids (B, T), attention_mask (B, T), mel (n, M, F), conv_frames (n,)

The template (ChatML), as published:

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\nAudio 1: <|audio_bos|><|AUDIO|>...<|audio_eos|>\\nWhat is it?<|im_end|>\\n
    <|im_start|>assistant\\n

Nothing in a conversation is skipped: content that is not understood raises PromptError.
"""

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2audio_core import audio, audio_files
from qwen2audio_core.errors import PromptError
from qwen2audio_core.frontend import clip_lengths, log_mel
from qwen2audio_core.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"

LOUDEST = 8.0  # beyond full scale is clipping; far beyond it are integers that were not divided

_SOURCES = ("audio", "audio_url", "path", "url", "input_audio")
_TYPES = ("text", "audio", "audio_url", "input_audio")
_HELP = (
    'expected a string, {"type": "text", "text": ...} or'
    ' {"type": "audio", "audio": file, URL, bytes or samples}'
)

Long = Literal["split", "error", "cut"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation, ready for the model."""

    ids: list[int]  # T; a clip's placeholder stands audio_tokens times
    clips: list[Tensor]  # waveforms (N,), 16 kHz mono float32, in the order of their placeholders
    audio_tokens: list[int]  # A of each clip
    notices: list[str]  # what a person should know, such as where a long clip was split
    # Spans of ids that hold an assistant's turn with its <|im_end|>: what training learns from.
    answers: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of unequal lengths, as the model's forward takes them."""

    ids: Tensor  # (B, T) int64, padded at the left
    attention_mask: Tensor  # (B, T) int64, 0 where padded
    mel: Tensor | None  # (n, M, F) float32, the clips of all rows in row order, zeros behind each
    conv_frames: Tensor | None  # (n,) int64, frames the encoder's attention sees

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        mel, frames = self.mel, self.conv_frames
        return Batch(
            self.ids.to(device),
            self.attention_mask.to(device),
            None if mel is None else mel.to(device),
            None if frames is None else frames.to(device),
        )


def encode(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    system: str | None = None,
    add_generation_prompt: bool = True,
    continue_last: bool = False,
    long: Long = "split",
    special_in_text: bool = False,
    sampling_rate: int | None = None,
    resampler: str = "soxr",
) -> Prompt:
    """Apply the published chat template.

    messages         [{"role": "system" | "user" | "assistant", "content": ...}]; content is a text
                     or a list of items: texts, {"type": "text", "text": ...}, and clips
                     {"type": "audio", KEY: source} with KEY one of audio, audio_url, path, url;
                     {"type": "audio_url", "audio_url": {"url": ...}}; {"type": "input_audio",
                     "input_audio": {"data": base64}}. "type" may be left out. A source is whatever
                     audio.load reads; beside samples stands "sampling_rate". Keys that hold None
                     count as absent. Clips are numbered over the whole conversation.
    system           the system message's text, the same as such a message in the first place. None
                     is the published default where the conversation does not begin with its own, ""
                     an empty system turn. The model knows no conversation without one; for prompts
                     without any markup there is encode_raw.
    add_generation_prompt  end with the opening of the assistant's turn
    continue_last    end with the last turn, which must be the assistant's, left open: the answer
                     goes on where it ends
    long             clips over 30 s: "split" into several, each with its own "Audio n:"; "error";
                     or "cut" with a notice
    special_in_text  let special tokens that stand in texts be tokens; by default they are text.
                     Placeholders for audio may not stand in texts, clips come from items alone.
    sampling_rate    Hz of samples given without a rate of their own
    resampler        as in audio.load
    errors           PromptError, naming message and item; AudioError for a clip that cannot be read
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(
            'no messages: expected a list such as [{"role": "user", "content": "Hello"}]'
        )
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not isinstance(system, str | None):
        raise PromptError(f"system must be a text, got {type(system).__name__}")
    if system is not None and any(role == "system" for role, _ in turns):
        raise PromptError("a system text and a system message were both given: leave one out")
    if system is not None or turns[0][0] != "system":
        turns.insert(0, ("system", [_Text(DEFAULT_SYSTEM if system is None else system, "system")]))

    writer = _Writer(tokenizer, special_in_text)
    clips: list[Tensor] = []
    audio_tokens: list[int] = []
    notices: list[str] = []
    answers: list[tuple[int, int]] = []
    opening = tokenizer.encode("assistant\n")
    if continue_last and turns[-1][0] != "assistant":
        raise PromptError(f"the last turn is the {turns[-1][0]}'s, there is nothing to go on with")
    for number, (role, items) in enumerate(turns, 1):
        writer.special("<|im_start|>")
        begin = len(writer.finish())
        writer.text(role + "\n")
        for item in items:
            writer.where = item.where
            if isinstance(item, _Text):
                writer.text(item.text)
                continue
            for piece in _load(
                item.source, item.rate, sampling_rate, resampler, long, item.where, notices
            ):
                clips.append(piece)
                audio_tokens.append(clip_lengths(piece.shape[0]).audio_tokens)
                writer.text(f"Audio {len(clips)}: ")
                writer.special(AUDIO_BOS)
                writer.special(AUDIO, audio_tokens[-1])
                writer.special(AUDIO_EOS)
                writer.text("\n")
        if continue_last and number == len(turns):
            return Prompt(writer.finish(), clips, audio_tokens, notices, answers)
        writer.special("<|im_end|>")
        if role == "assistant":
            ids = writer.finish()
            # An answer that begins with a line end shares a token with the role's own.
            same = [a == b for a, b in zip(opening, ids[begin:], strict=False)]
            answers.append((begin + [*same, False].index(False), len(ids)))
        writer.text("\n")
    if add_generation_prompt:
        writer.special("<|im_start|>")
        writer.text("assistant\n")
    return Prompt(writer.finish(), clips, audio_tokens, notices, answers)


def encode_raw(
    text: str,
    clips: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    long: Long = "error",
    sampling_rate: int | None = None,
    resampler: str = "soxr",
) -> Prompt:
    """A prompt without chat markup, as the base model takes it.

    text     for example "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:".
             Special tokens in it are tokens. A placeholder <|AUDIO|> that stands without both
             <|audio_bos|> and <|audio_eos|> gets them, for the model never saw it bare.
    clips    one source for each placeholder, in order: whatever audio.load reads,
             or a pair (samples, rate)
    long     clips over 30 s: "error" or "cut". A placeholder is one clip, so what "split" would cut
             is an error too; to hear all of a long recording, prompt for each piece of
             audio.split.
    errors   PromptError, where placeholders and clips differ in number; AudioError
    """
    if isinstance(clips, (str, bytes, os.PathLike, Tensor)) or not isinstance(clips, Sequence):
        raise PromptError(f"clips must be a list of sources, got {type(clips).__name__}")
    given = tokenizer.encode(text, special=True)
    audio_id, bos, eos = (tokenizer.id_of(token) for token in (AUDIO, AUDIO_BOS, AUDIO_EOS))
    slots = given.count(audio_id)
    if slots != len(clips):
        raise PromptError(
            f"the text has {slots} placeholder{'s' * (slots != 1)} {AUDIO} for {len(clips)}"
            f" clip{'s' * (len(clips) != 1)}: give one for each, as {AUDIO_BOS}{AUDIO}{AUDIO_EOS}"
        )
    if not given:
        raise PromptError("the prompt is empty")
    ids: list[int] = []
    waveforms: list[Tensor] = []
    audio_tokens: list[int] = []
    notices: list[str] = []
    for i, token in enumerate(given):
        if token != audio_id:
            ids.append(token)
            continue
        where = f"clips[{len(waveforms)}]"
        clip = clips[len(waveforms)]
        source, rate = clip if isinstance(clip, tuple) else (clip, None)
        pieces = _load(source, rate, sampling_rate, resampler, long, where, notices)
        if len(pieces) != 1:
            raise PromptError(
                f"{where} is longer than 30 s, and a placeholder cannot hold its {len(pieces)}"
                ' pieces: use long="cut", or prompt for each piece'
            )
        waveforms.append(pieces[0])
        audio_tokens.append(clip_lengths(pieces[0].shape[0]).audio_tokens)
        run = [audio_id] * audio_tokens[-1]
        bare = given[i - 1 : i] != [bos] and given[i + 1 : i + 2] != [eos]
        ids += [bos, *run, eos] if bare else run
    return Prompt(ids, waveforms, audio_tokens, notices)


def check_length(prompt: Prompt, limit: int) -> int:
    """The tokens that a prompt leaves for its answer; arguments and errors as in `room`."""
    return room(len(prompt.ids), limit, prompt.audio_tokens)


def room(tokens: int, limit: int, audio_tokens: Sequence[int] = ()) -> int:
    """How many tokens a prompt of so many leaves for its answer in the model's context.

    limit         config.text.max_position_embeddings; 8,192 in the published model
    audio_tokens  those of each clip among the prompt's, for the error to name
    errors        PromptError where nothing is left
    """
    if tokens >= limit:
        clips = len(audio_tokens)
        heard = f", {sum(audio_tokens)} of them for {clips} clip{'s' * (clips != 1)}"
        raise PromptError(
            f"the prompt has {tokens} tokens{heard * bool(clips)}, and the model's context holds"
            f" {limit} with the answer: use less audio or text"
        )
    return limit - tokens


def collate(
    prompts: Sequence[Prompt],
    pad_id: int,
    *,
    device: str | torch.device = "cpu",
    num_mel_bins: int = 128,
) -> Batch:
    """Pad prompts at the left to one length and compute their clips' log-mels on `device`.

    pad_id   151643, <|endoftext|>, in the published model; never seen behind the mask
    """
    if not prompts:
        raise PromptError("no prompts to put into a batch")
    longest = max(len(prompt.ids) for prompt in prompts)
    pads = [longest - len(prompt.ids) for prompt in prompts]
    ids = [[pad_id] * pad + prompt.ids for pad, prompt in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    clips = [clip for prompt in prompts for clip in prompt.clips]
    mel = conv_frames = None
    if clips:
        mels = [log_mel(clip.to(device), num_mel_bins) for clip in clips]
        most = max(one.shape[1] for one in mels)
        mel = torch.stack([F.pad(one, (0, most - one.shape[1])) for one in mels])
        frames = [clip_lengths(clip.shape[0]).conv_frames for clip in clips]
        conv_frames = torch.tensor(frames, device=device)
    return Batch(
        torch.tensor(ids, device=device), torch.tensor(mask, device=device), mel, conv_frames
    )


@dataclass(frozen=True)
class _Text:
    text: str
    where: str


@dataclass(frozen=True)
class _Clip:
    source: Any
    rate: int | None
    where: str


class _Writer:
    """Collects ids. Text between two special tokens is tokenized in one go, as the reference does:
    the line end behind a role and the one a text begins with may be one token."""

    def __init__(self, tokenizer: Tokenizer, special_in_text: bool):
        self._tokenizer = tokenizer
        self._parse = special_in_text
        self._ids: list[int] = []
        self._texts: list[str] = []
        self.where = ""

    def text(self, text: str) -> None:
        self._texts.append(text)

    def special(self, token: str, count: int = 1) -> None:
        self.finish()
        self._ids += [self._tokenizer.id_of(token)] * count

    def finish(self) -> list[int]:
        try:
            ids = self._tokenizer.encode("".join(self._texts), special=self._parse)
        except PromptError as error:
            raise PromptError(f"{self.where}: {error}") from error
        if self._parse and self._tokenizer.id_of(AUDIO) in ids:
            raise PromptError(
                f"{self.where}: {AUDIO} stands in a text; give the clip as an item of its own,"
                ' {"type": "audio", "audio": ...}'
            )
        self._ids += ids
        self._texts.clear()
        return self._ids


def _turn(message: Any, where: str) -> tuple[str, list[_Text | _Clip]]:
    if not isinstance(message, Mapping):
        raise PromptError(f'{where} is a {type(message).__name__}, expected {{"role", "content"}}')
    unknown = [
        key
        for key, value in message.items()
        if key not in ("role", "content") and value is not None
    ]
    if unknown:
        raise PromptError(f"{where}: unknown key {unknown[0]!r}, expected role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise PromptError(f"{where}: role is {role!r}, expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return role, [_Text(content, f"{where}.content")]
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise PromptError(
            f"{where}: content is {'None' if content is None else 'a ' + type(content).__name__},"
            " expected a string or a list of items"
        )
    return role, [_item(item, f"{where}.content[{i}]") for i, item in enumerate(content)]


def _item(item: Any, where: str) -> _Text | _Clip:
    if isinstance(item, str):
        return _Text(item, where)
    if not isinstance(item, Mapping):
        raise PromptError(f"{where} is a {type(item).__name__}, {_HELP}")
    # Tables of mixed items (datasets, parquet) fill the keys that an item lacks with None.
    given = {key: value for key, value in item.items() if value is not None}
    kind = given.pop("type", None)
    if kind is not None and kind not in _TYPES:
        raise PromptError(f"{where}: unknown type {kind!r}, {_HELP}")
    rate = given.pop("sampling_rate", None)
    unknown = [key for key in given if key != "text" and key not in _SOURCES]
    if unknown:
        raise PromptError(f"{where}: unknown key {unknown[0]!r}, {_HELP}")
    if len(given) != 1:
        found = ", ".join(given) if given else "none that holds a value"
        raise PromptError(
            f"{where} must have one of the keys text, {', '.join(_SOURCES)}; found {found}"
        )
    ((key, value),) = given.items()
    if kind is not None and (kind == "text") != (key == "text"):
        raise PromptError(f"{where}: type {kind!r} does not go with the key {key!r}, {_HELP}")
    if key == "text":
        if not isinstance(value, str) or rate is not None:
            wrong = "sampling_rate" if isinstance(value, str) else type(value).__name__
            raise PromptError(
                f"{where}: a text item must hold a string and nothing else, found {wrong}"
            )
        return _Text(value, where)
    if isinstance(value, Mapping) and key in ("audio", "path") and "array" in value:
        rate = value.get("sampling_rate") if rate is None else rate
    return _Clip(_source(key, value, where), rate, where)


def _source(key: str, value: Any, where: str) -> Any:
    """What audio.load reads, out of the dictionaries of OpenAI's interface and of `datasets`."""
    if isinstance(value, Mapping) and key in ("audio", "path"):
        for inner in ("array", "bytes", "path"):  # a column of clips, read or not
            if value.get(inner) is not None:
                return value[inner]
    if not isinstance(value, Mapping):
        if key == "input_audio":
            raise PromptError(f'{where}: input_audio must be {{"data": base64, "format": ...}}')
        return value
    inner = "data" if key == "input_audio" else "url"
    content = value.get(inner)
    if not isinstance(content, str) or not content:
        raise PromptError(f"{where}: {key} must hold {inner!r} with a text")
    if inner == "url" or content.startswith("data:"):
        return content
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PromptError(f"{where}: input_audio.data is not base64 ({error})") from error


def _load(
    source: Any,
    rate: int | None,
    default_rate: int | None,
    resampler: str,
    long: Long,
    where: str,
    notices: list[str],
) -> list[Tensor]:
    """A clip's waveform, or the pieces of one that is too long.

    rate          Hz stated beside this very source
    default_rate  Hz of samples without a rate of their own
    """
    # Files and URLs are named in messages as audio.load names them, samples by their place.
    named = isinstance(source, (str, os.PathLike))
    name = audio_files.source_name(source) if named else where
    if (
        rate is None
        and not isinstance(source, (str, bytes, bytearray, memoryview, os.PathLike))
        and not hasattr(source, "read")
    ):
        rate = default_rate
    waveform = audio.load(source, sampling_rate=rate, resampler=resampler, name=name)
    peak = float(waveform.detach().abs().max())
    if peak > LOUDEST:
        notices.append(
            f"{name}: its samples reach {peak:,.0f}, and 1 is full scale: divide what was integers"
        )
    return [
        piece.waveform for piece in audio.split(waveform, long, name=name, notice=notices.append)
    ]
