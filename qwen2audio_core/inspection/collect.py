"""Ask a question about a clip and gather what the model did with it."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2audio_core import attribution, chat, probe
from qwen2audio_core.assistant import Assistant, user_turn
from qwen2audio_core.attribution import Attribution
from qwen2audio_core.chat import Batch, Prompt
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import SAMPLE_RATE, clip_lengths
from qwen2audio_core.layout import Layout, is_audio
from qwen2audio_core.points import Change, Point

MOST_TOKENS = 24  # of an answer, whose attention and attributions are measured
ALTERNATIVES = 5
SIMILAR = 64  # most rows of a similarity matrix; longer clips are averaged to it
SMALL = 1024  # text width up to which eight gradients are computed at once
KINDS = ("template", "system", "text", "audio", "answer")

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Stage:
    """A part of the work, how long it took and what memory it needed."""

    name: str
    seconds: float
    bytes: int  # on a GPU the most that tensors held; on a CPU what the process held at its end


@dataclass
class Inspection:
    """Everything the report shows. L layers, H heads, K inspected tokens, A audio tokens.

    All clips of the conversation lie behind one another on one time axis.
    """

    model: str
    device: str
    dtype: str
    question: str
    answer: str
    finish_reason: str
    waveform: Tensor  # (N,) at 16 kHz
    bounds: list[float]  # s, where clips begin, and the end of the last
    audio_tokens: list[int]  # of each clip; the first one begins where the clip does
    mel: Tensor  # (M, F), 10 ms a frame
    layout: Layout  # of prompt and answer
    answer_start: int  # position of the answer's first token
    shown: int  # K, the first tokens of the answer, the end token among them
    # The answer: what the model would have said, before penalties and temperature.
    probabilities: Tensor  # (K,) of the tokens written
    alternatives: list[list[tuple[str, float]]]  # K lists of the likeliest tokens
    # The audio tower: row 0 is before its first layer, then behind each.
    norms: Tensor  # (L + 1, frames) root mean square of each 20 ms frame
    similarity: Tensor  # (L + 1, n, n) cosine between frames, less the clip's mean frame
    # The language model.
    attention: Tensor  # (L, H, K, A) float16, from the position that wrote the token
    attention_by_kind: Tensor  # (L, H, K, 5) sums over positions of each of KINDS
    lens: list[list[list[tuple[str, float]]]]  # (L + 1) x K lists of likeliest tokens
    lens_written: Tensor  # (L + 1, K) probability of the token that was written
    lens_clip: list[list[tuple[str, float]]]  # (L + 1) x A, likeliest token at the clip's places
    attributions: dict[str, Attribution]  # "rollout", "gradient", "occlusion"
    stages: list[Stage] = field(default_factory=list)

    @property
    def duration(self) -> float:
        return self.bounds[-1]

    @property
    def tokens(self) -> list[str]:
        """The inspected tokens of the answer as text."""
        return self.layout.pieces[self.answer_start : self.answer_start + self.shown]

    def arrays(self) -> dict[str, Any]:
        """The numbers under plain names, for np.savez."""
        held = {
            "waveform": self.waveform,
            "mel": self.mel,
            "clip_bounds_seconds": torch.tensor(self.bounds),
            "ids": torch.tensor(self.layout.ids),
            "answer_start": torch.tensor(self.answer_start),
            "probabilities": self.probabilities,
            "encoder_norms": self.norms,
            "encoder_similarity": self.similarity,
            "attention": self.attention,
            "attention_by_kind": self.attention_by_kind,
            "lens_written": self.lens_written,
            **{name: found.weights for name, found in self.attributions.items()},
            "stage_seconds": torch.tensor([stage.seconds for stage in self.stages]),
            "stage_bytes": torch.tensor([stage.bytes for stage in self.stages]),
        }
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in held.items()}
        arrays["kinds"] = self.layout.kinds
        arrays["tokens"] = self.layout.pieces
        arrays["stages"] = [stage.name for stage in self.stages]
        return arrays


def inspect(
    assistant: Assistant,
    clip: Any,
    question: str | None = None,
    *,
    most_tokens: int = MOST_TOKENS,
    on_progress: Progress | None = None,
    system: str | None = None,
    long: chat.Long = "split",
    **options: Any,
) -> Inspection:
    """Ask a question about a clip and look at how it was answered.

    clip         whatever Assistant.ask takes, one clip or a list
    most_tokens  of the answer, whose attention and attributions are measured
    on_progress  called with (what is done now, part of the whole 0 to 1)
    options      as in Assistant.ask; greedy where none of them draws
    errors       AudioError, PromptError, InputError
    """
    if all(options.get(name) is None for name in ("greedy", "temperature", "top_k", "top_p")):
        options["greedy"] = True
    work = _Work(assistant.device, on_progress)
    with work.stage("clip", 0.02):
        prompt = assistant.encode(
            [user_turn(question, clip)], system, long, options.pop("notice", None)
        )
    with work.stage("answer", 0.1):
        reply = assistant.stream_prompts([prompt], **options).finished()[0]
    work.split(reply.seconds, len(reply.ids))
    return look(
        assistant,
        prompt,
        reply.ids,
        question=question or "",
        text=reply.text,
        finish_reason=reply.finish_reason,
        most_tokens=most_tokens,
        work=work,
    )


def look(
    assistant: Assistant,
    prompt: Prompt,
    answer: Sequence[int],
    *,
    question: str = "",
    text: str | None = None,
    finish_reason: str = "",
    most_tokens: int = MOST_TOKENS,
    on_progress: Progress | None = None,
    work: "_Work | None" = None,
) -> Inspection:
    """Inspect an answer that is already there, such as the last one of a conversation.

    prompt, answer   what was asked, with at least one clip, and the ids that were written
    """
    if not prompt.clips:
        raise InputError("there is no clip in this conversation, so nothing to inspect")
    if not answer:
        raise InputError("the answer is empty, so there is nothing to inspect")
    if most_tokens < 1:
        raise InputError(f"most_tokens is {most_tokens}, it must be at least 1")
    model, tokenizer = assistant.model, assistant.tokenizer
    work = work or _Work(assistant.device, on_progress)
    layout = Layout.of(prompt.ids, tokenizer, answer)
    shown = min(len(answer), most_tokens)
    start = len(prompt.ids)
    tokens = range(start, start + shown)
    with work.stage("log-mel", 0.15):
        batch = attribution.answered(prompt, answer[:shown], model)
    with work.stage("look inside", 0.2):
        seen = _passes(assistant, batch, layout, tokens)
    with work.stage("logit lens", 0.3):
        lens, written, lens_clip = _lenses(assistant, batch, layout, tokens)
    found = {}
    with work.stage("attention rollout", 0.35):
        found["rollout"] = attribution.rollout(model, batch, tokens)
    rows = 8 if model.config.text.hidden_size <= SMALL else 1
    with work.stage("gradients", 0.4):
        found["gradient"] = attribution.gradient(
            model, batch, tokens, rows=rows, on_progress=work.inside(0.4, 0.75)
        )
    with work.stage("occlusion", 0.75):
        found["occlusion"] = attribution.occlusion(
            model, batch, tokens, on_progress=work.inside(0.75, 1.0)
        )
    ends = [0.0]
    for clip in prompt.clips:
        ends.append(ends[-1] + len(clip) / SAMPLE_RATE)
    return Inspection(
        model=assistant.name,
        device=str(assistant.device),
        dtype=str(assistant.dtype).removeprefix("torch."),
        question=question,
        answer=tokenizer.decode(answer) if text is None else text,
        finish_reason=finish_reason,
        waveform=torch.cat(prompt.clips),
        bounds=ends,
        audio_tokens=prompt.audio_tokens,
        mel=_one_mel(prompt, batch),
        layout=layout,
        answer_start=start,
        shown=shown,
        lens=lens,
        lens_written=written,
        lens_clip=lens_clip,
        attributions=found,
        stages=work.stages,
        **seen,
    )


def _passes(assistant: Assistant, batch: Batch, layout: Layout, tokens: range) -> dict[str, Any]:
    """One run over everything: attention, the audio tower's states, and the answer's chances."""
    model = assistant.model
    device = batch.ids.device
    readers = torch.tensor(list(tokens), device=device) - 1  # they wrote the tokens
    names = ["audio" if is_audio(kind) else kind for kind in layout.kinds[: batch.ids.shape[1]]]
    kinds = torch.tensor([KINDS.index(name) for name in names], device=device)
    member = F.one_hot(kinds, len(KINDS)).float()  # (T, 5)
    audio = (kinds == KINDS.index("audio")).nonzero()[:, 0]
    maps: list[Tensor] = []
    by_kind: list[Tensor] = []

    def attend(weights: Tensor, point: Point) -> None:
        rows = weights[0][:, readers].float()  # (H, K, T)
        maps.append(rows[:, :, audio].half().cpu())
        by_kind.append((rows @ member).cpu())

    norms: list[Tensor] = []
    similar: list[Tensor] = []
    assert batch.conv_frames is not None
    frames = batch.conv_frames.tolist()

    def hear(x: Tensor, point: Point) -> None:
        states = torch.cat([row[:many] for row, many in zip(x, frames, strict=True)]).float()
        norms.append(states.square().mean(-1).sqrt().cpu())
        every = -(-len(states) // SIMILAR)
        pooled = F.avg_pool1d(states.T[None].contiguous(), every, ceil_mode=True)[0].T
        # What all frames have in common says nothing about how they differ.
        unit = F.normalize(pooled - pooled.mean(0), dim=-1)
        similar.append((unit @ unit.T).cpu())

    watch: dict[str, Change] = {
        "blocks.*.attn.hook_pattern": attend,
        "audio.blocks.0.hook_resid_pre": hear,
        "audio.blocks.*.hook_resid_post": hear,
    }
    with torch.inference_mode(), probe.hooks(model, watch):
        logits = probe.run(model, batch)[0, readers].float()
    chances = logits.softmax(-1)
    best = chances.topk(ALTERNATIVES)
    written = chances.gather(-1, batch.ids[0, readers + 1, None])[:, 0].cpu()
    return {
        "probabilities": written,
        "alternatives": _named(assistant, best.indices.cpu(), best.values.cpu()),
        "norms": torch.stack(norms),
        "similarity": torch.stack(similar),
        "attention": torch.stack(maps),
        "attention_by_kind": torch.stack(by_kind),
    }


def _lenses(
    assistant: Assistant, batch: Batch, layout: Layout, tokens: range
) -> tuple[list[list[list[tuple[str, float]]]], Tensor, list[list[tuple[str, float]]]]:
    targets = layout.ids[tokens.start : tokens.stop]
    readers = [token - 1 for token in tokens]
    lens = probe.logit_lens(assistant.model, batch, readers, top=3, targets=targets)
    assert lens.wanted is not None
    answer = [
        _named(assistant, ids[0], chances[0])
        for ids, chances in zip(lens.ids, lens.probabilities, strict=True)
    ]
    heard = probe.logit_lens(assistant.model, batch, layout.columns("audio"), top=1)
    clip = [
        [row[0] for row in _named(assistant, ids[0], chances[0])]
        for ids, chances in zip(heard.ids, heard.probabilities, strict=True)
    ]
    return answer, lens.wanted[:, 0], clip


def _named(assistant: Assistant, ids: Tensor, chances: Tensor) -> list[list[tuple[str, float]]]:
    """Rows of ids and probabilities as rows of (text, probability)."""
    words = {
        token: assistant.tokenizer.decode([token], skip_special=False)
        for token in set(ids.flatten().tolist())
    }
    return [
        [(words[token], chance) for token, chance in zip(row, own, strict=True)]
        for row, own in zip(ids.tolist(), chances.tolist(), strict=True)
    ]


def _one_mel(prompt: Prompt, batch: Batch) -> Tensor:
    """The clips' log-mels behind one another, each as long as its sound."""
    assert batch.mel is not None
    rows = [
        mel[:, : clip_lengths(len(clip)).mel_frames]
        for mel, clip in zip(batch.mel, prompt.clips, strict=True)
    ]
    return torch.cat(rows, 1).cpu()


class _Work:
    """Times and memory of each stage, and how far the work is."""

    def __init__(self, device: torch.device, on_progress: Progress | None):
        self.stages: list[Stage] = []
        self._device = device
        self._tell = on_progress or (lambda what, part: None)
        self._what = ""

    @contextmanager
    def stage(self, name: str, part: float) -> Iterator[None]:
        self._what = name
        self._tell(name, part)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self.stages.append(Stage(name, time.perf_counter() - began, self._memory()))

    def inside(self, first: float, last: float) -> Callable[[int, int], None]:
        def tell(done: int, whole: int) -> None:
            self._tell(self._what, first + (last - first) * done / whole)

        return tell

    def split(self, seconds: dict[str, float], tokens: int) -> None:
        """Replace the stage of the answer by its parts, as the generation timed them."""
        whole = self.stages.pop()
        names = {
            "encode": "audio tower",
            "prefill": "prompt",
            "decode": f"{tokens} token{'s' * (tokens != 1)}",
        }
        rest = whole.seconds - sum(seconds.values())
        self.stages.append(Stage("log-mel for the answer", max(0.0, rest), whole.bytes))
        for stage, name in names.items():
            self.stages.append(Stage(name, seconds.get(stage, 0.0), whole.bytes))

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        try:
            with open("/proc/self/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):  # not Linux
            return 0
