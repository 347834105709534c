"""Looking before training: what a data set is, what is learned from a row, what memory it takes."""

import math
from collections import Counter
from dataclasses import dataclass

from torch import nn

from qwen2audio_core import assistant
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.tokenizer import Tokenizer
from qwen2audio_core.training import lora
from qwen2audio_core.training.data import Example, Loader
from qwen2audio_core.training.loop import (
    Settings,
    freeze,
    planned_batches,
    read_rows,
    read_valid,
)
from qwen2audio_core.weights import without_storage

SHOWN = 10  # bad rows and sources that are printed


def _loader(settings: Settings) -> tuple[Loader, Qwen2AudioConfig]:
    folder = assistant.find(settings.model, weights=False)
    config = Qwen2AudioConfig.from_json(folder / "config.json")
    loader = Loader(
        read_rows(settings),
        Tokenizer.from_folder(folder),
        num_mel_bins=config.audio.num_mel_bins,
        limit=config.text.max_position_embeddings,
        pairs=settings.stage == "dpo",
    )
    return loader, config


# What a data set is


def statistics(settings: Settings) -> tuple[str, int]:
    """Read every row and every clip, also of those to measure on; returns a page on the data, the
    bad rows first, and how many these are."""
    loader, config = _loader(settings)
    rows = loader.rows
    bad = list(rows.bad)
    held, held_good, held_bad = read_valid(settings), 0, list[str]()
    if held is not None:
        bins = config.audio.num_mel_bins
        reader = Loader(held, loader.tokenizer, num_mel_bins=bins, limit=loader.limit)
        held_bad += held.bad
        for number in range(len(held)):
            examples, faults = reader.examples([number])
            held_good += len(examples)
            held_bad += faults
    seconds: list[float] = []
    tokens: list[int] = []
    trained = turns = 0
    clips: Counter[int] = Counter()
    sources: Counter[str] = Counter()
    for number in range(len(rows)):
        examples, faults = loader.examples([number])
        bad += faults
        for example in examples:
            seconds.append(sum(map(len, example.clips)) / 16_000)
            told = example.row.seconds
            if told is not None and abs(told - seconds[-1]) > 0.1 + 0.05 * seconds[-1]:
                bad.append(
                    f"{example.row.where}: seconds is {told}, the clips have {seconds[-1]:.2f}"
                )
            tokens.append(len(example.ids))
            trained += sum(end - begin for begin, end in example.answers)
            turns += len(example.answers)
            clips[len(example.clips)] += 1
            sources[example.row.source or "(no source)"] += 1
    faulty = bad + held_bad
    lines = [f"bad  {line}" for line in faulty[:SHOWN]]
    if len(faulty) > SHOWN:
        lines.append(f"bad  ... and {len(faulty) - SHOWN:,} more")
    lines.append(f"rows            {len(tokens):,} good, {len(bad):,} bad")
    if held is not None:
        lines.append(f"to measure on   {held_good:,} good, {len(held_bad):,} bad")
    if not tokens:
        return "\n".join(lines), len(faulty)
    by_clips = ", ".join(f"{count:,} with {n}" for n, count in sorted(clips.items()))
    lines += [
        f"answers         {turns:,} trained on, {trained:,} tokens with their ends",
        f"clips           {sum(n * count for n, count in clips.items()):,} ({by_clips})",
        f"audio           {sum(seconds) / 3600:.2f} h; a row: {_spread(seconds, '.1f')} s",
        f"tokens          {sum(tokens):,}; a row: {_spread(tokens, '.0f')}",
    ]
    batches = planned_batches(settings, rows, 0)
    length = rows.seconds
    padded = sum(float(length[batch].max()) * len(batch) for batch in batches)
    heard = sum(float(length[batch].sum()) for batch in batches)
    waste = (
        f", {100 * (1 - heard / padded):.1f} % of the audio in them is padding" if padded else ""
    )
    lines.append(f"batches         {len(batches):,} an epoch{waste}")
    for source, count in sources.most_common(SHOWN):
        lines.append(f"source          {source}: {count:,}")
    if len(sources) > SHOWN:
        lines.append(f"source          ... and {len(sources) - SHOWN} more")
    return "\n".join(lines), len(faulty)


def _spread(values: list[float] | list[int], form: str) -> str:
    ordered = sorted(values)
    places = (0, len(ordered) // 2, math.ceil(0.95 * len(ordered)) - 1, len(ordered) - 1)
    names = ("least", "median", "95 %", "most")
    return ", ".join(
        f"{name} {ordered[place]:{form}}" for name, place in zip(names, places, strict=True)
    )


# What is learned from a row


def masks(settings: Settings, count: int) -> str:
    """The first rows token by token: what the model reads, and in brackets what it learns."""
    loader, config = _loader(settings)
    pages = []
    for number in range(min(count, len(loader.rows))):
        examples, bad = loader.examples([number])
        pages += bad
        for example in examples:
            pages.append(mask(example, loader.tokenizer, config.audio_token_id))
            if loader.pairs and example.rejected is not None:
                span = (example.rejected_begin, len(example.rejected))
                worse = Example(example.rejected, [span], [], example.row)
                pages.append("rejected: " + mask(worse, loader.tokenizer, config.audio_token_id))
    return "\n\n".join(pages)


def mask(example: Example, tokenizer: Tokenizer, audio_token_id: int) -> str:
    """One row: tokens apart by a middle dot, runs of audio counted, [what is trained on].

    asr_en  data.jsonl:1   12 of 61 tokens are trained on
    <|audio_bos|>·<|AUDIO|> x 38·<|audio_eos|>·Detect· the [·hello·<|endoftext|>]
    """
    trained = {i for begin, end in example.answers for i in range(begin, end)}
    parts: list[str] = []
    i = 0
    while i < len(example.ids):
        if i in trained and i - 1 not in trained:
            parts.append("[")
        run = 1
        if example.ids[i] == audio_token_id:
            while example.ids[i + run : i + run + 1] == [audio_token_id]:
                run += 1
        text = tokenizer.bytes_of(example.ids[i], skip_special=False).decode(
            "utf-8", "backslashreplace"
        )
        parts.append(text.replace("\n", "\\n") + (f" x {run}" if run > 1 else ""))
        i += run
        if i - 1 in trained and i not in trained:
            parts.append("]")
    line = "·".join(parts).replace("[·", "[").replace("·]", "]")
    head = f"{example.row.source}  " if example.row.source else ""
    return (
        f"{head}{example.row.where}   {len(trained)} of {len(example.ids)} tokens are trained on\n"
        + line
    )


# What memory a run takes


@dataclass(frozen=True)
class Memory:
    """Bytes, counted and not measured. What the allocator and the libraries take comes on top."""

    weights: int  # frozen ones in the checkpoint's two bytes, trained ones in float32
    casts: int  # of the trained matrices, in the bfloat16 that they are multiplied in
    reference: int  # the model as it was, which dpo compares with, float32; an adapter needs none
    gradients: int  # of what is trained, float32
    moments: int  # AdamW's two, float32
    activations: int  # kept for the backward pass at the longest batch
    head: int  # logits and their gradient at the trained positions

    @property
    def total(self) -> int:
        kept = self.weights + self.casts + self.reference + self.gradients + self.moments
        return kept + self.activations + self.head


def count(settings: Settings, config: Qwen2AudioConfig) -> tuple[Memory, int, int]:
    """The memory of one process, the parameters that are trained, and all of them.

    A batch is taken as full: batch_tokens in the language model, batch_seconds in the encoder, an
    eighth of the tokens trained on.
    """
    model = without_storage(config)
    if settings.adapter is not None:
        lora.add(model, settings.adapter)
    freeze(model, settings.freeze)
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_bytes = 2 if settings.adapter is not None and settings.bf16 else 4
    weights = frozen_bytes * (everything - trained) + 4 * trained
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim > 1 and "embed" not in name
    )
    casts = 2 * matrices if settings.bf16 else 0
    size = 2 if settings.bf16 else 4
    frames = round(50 * settings.batch_seconds)
    tokens = round(settings.batch_tokens)
    towers = (
        (model.audio_tower, _encoder_layer(config, size), config.audio.encoder_layers, frames,
         config.audio.d_model),
        (model.language_model.model, _decoder_layer(config, size), config.text.num_hidden_layers,
         tokens, config.text.hidden_size),
    )  # fmt: skip
    activations = 0
    below = False  # something that is trained lies below, so gradients pass through all above it
    for tower, layer, depth, length, width in towers:
        below = below or _trains(tower)
        if below:
            # With recomputation a layer keeps its input alone, and one layer at a time is whole.
            whole = 1 if settings.recompute else depth
            activations += length * layer * whole + length * width * 4 * depth * settings.recompute
            if tower is model.audio_tower:  # two mel frames a frame, both convolutions and gelus
                activations += length * size * (2 * config.audio.num_mel_bins + 6 * width)
    head = (tokens // 8) * config.text.vocab_size * (size + 4 + 4)
    reference = 4 * everything if settings.stage == "dpo" and settings.adapter is None else 0
    found = Memory(weights, casts, reference, 4 * trained, 8 * trained, activations, head)
    return found, trained, everything


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _encoder_layer(config: Qwen2AudioConfig, size: int) -> int:
    """Bytes a frame keeps in one encoder layer: the stream twice and two norms in float32; the
    norms' outputs, q, k, v and the attention's output, the MLP before and behind its gelu."""
    width, inner = config.audio.d_model, config.audio.encoder_ffn_dim
    return 4 * 2 * width + size * (6 * width + 2 * inner)


def _decoder_layer(config: Qwen2AudioConfig, size: int) -> int:
    """Bytes a token keeps in one decoder layer: the stream twice and the norms' float32 copies; the
    norms' outputs, q, k, v before and behind the rotation, the attention's output, and gate, up,
    silu(gate) and their product."""
    text = config.text
    width, inner = text.hidden_size, text.intermediate_size
    keys = text.num_key_value_heads * text.head_dim
    return 4 * 4 * width + size * (5 * width + 3 * keys + 4 * inner)


def memory(settings: Settings) -> str:
    folder = assistant.find(settings.model, weights=False)
    config = Qwen2AudioConfig.from_json(folder / "config.json")
    found, trained, everything = count(settings, config)
    lines = [f"trained         {trained / 1e6:,.2f} M of {everything / 1e6:,.2f} M parameters"]
    names = ("weights", "casts", "reference", "gradients", "moments", "activations", "head")
    for name in (*names, "total"):
        if getattr(found, name):
            lines.append(f"{name:<15} {getattr(found, name) / 1e9:8.2f} GB")
    lines.append("counted for one process; the allocator's own need comes on top")
    return "\n".join(lines)
