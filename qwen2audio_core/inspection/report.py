"""An inspection as one HTML file: no network, no library, everything in it.

template.html holds the page, its style and its script; what is put in is one JSON object. Matrices
go as bytes in base64, one a value, with the number that the byte 255 stands for.
"""

import base64
import html
import io
import json
import wave
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from qwen2audio_core.frontend import SAMPLE_RATE
from qwen2audio_core.inspection.collect import KINDS, Inspection
from qwen2audio_core.layout import is_audio

MOST_ATTENTION = 2_000_000  # values of attention in a page; more are averaged over time, then cut
WAVE_COLUMNS = 800
NORM_COLUMNS = 400
MEL_COLUMNS = 1500


def to_html(seen: Inspection, title: str = "") -> str:
    """The report. Everything a person or the model wrote is data to the page, never markup.

    title   of the page; None for the question
    """
    page = (files("qwen2audio_core.inspection") / "template.html").read_text(encoding="utf-8")
    title = title or seen.question or "What was heard"
    # Inside a script element nothing but its end tag, and what begins a comment, is special.
    content = json.dumps(content_of(seen, title), ensure_ascii=False, separators=(",", ":"))
    content = (
        content.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )
    return page.replace("{{title}}", html.escape(title)).replace("{{content}}", content)


def content_of(seen: Inspection, title: str) -> dict[str, Any]:
    """What the page's script draws, as plain values."""
    attention, pooled, tokens = fit(seen.attention)
    notes = []
    if seen.shown < len(seen.layout.ids) - seen.answer_start:
        notes.append(f"Only the first {seen.shown} tokens of the answer were inspected.")
    if pooled > 1:
        notes.append(f"Attention is averaged over {40 * pooled} ms to keep this page small.")
    if tokens < seen.shown:
        notes.append(f"Attention by head is shown for the first {tokens} tokens.")
    return {
        "title": title,
        "model": seen.model,
        "device": seen.device,
        "dtype": seen.dtype,
        "question": seen.question,
        "answer": seen.answer,
        "finish": seen.finish_reason,
        "notes": notes,
        "duration": seen.duration,
        "bounds": seen.bounds,
        "audioTokens": seen.audio_tokens,
        "sound": "data:audio/wav;base64," + _text(_wav(seen.waveform)),
        "wave": _envelope(seen.waveform),
        # Of a log-mel a step of 1 is 4 decades of power, so 40 dB.
        "mel": _matrix(_fewer(seen.mel, MEL_COLUMNS), seen.mel.max().item() - 2.0),
        "norms": _matrix(_fewer(seen.norms, NORM_COLUMNS), 0.0),
        "normMeans": _rounded(seen.norms.mean(-1)),
        "similarity": _matrix(seen.similarity, -1.0, 1.0),
        "runs": _runs(seen),
        "kinds": list(KINDS),
        "tokens": [
            {"text": text, "p": round(p, 5), "others": [[t, round(q, 5)] for t, q in others]}
            for text, p, others in zip(
                seen.tokens, seen.probabilities.tolist(), seen.alternatives, strict=True
            )
        ],
        "attention": _matrix(attention, 0.0) | {"pooled": pooled},
        "byKind": _matrix(seen.attention_by_kind, 0.0, 1.0),
        "lens": [[[[t, round(p, 4)] for t, p in cell] for cell in layer] for layer in seen.lens],
        "lensWritten": [_rounded(row) for row in seen.lens_written],
        "lensClip": [[[t, round(p, 3)] for t, p in layer] for layer in seen.lens_clip],
        "attributions": {
            name: [_rounded(row) for row in found.weights]
            for name, found in seen.attributions.items()
        },
        "peaks": {
            name: [round(found.peak(k), 3) for k in range(seen.shown)]
            for name, found in seen.attributions.items()
        },
        "stages": [[one.name, round(one.seconds, 5), one.bytes] for one in seen.stages],
    }


def fit(attention: Tensor, most: int = MOST_ATTENTION) -> tuple[Tensor, int, int]:
    """(L, H, K, A) to at most so many values: averaged over time first, then fewer tokens.

    returns  the attention, how many audio tokens became one, how many tokens of K are left
    """
    layers, heads, tokens, places = attention.shape
    pooled = 1
    while layers * heads * tokens * -(-places // pooled) > most and places // (pooled + 1) >= 100:
        pooled += 1
    if pooled > 1:
        flat = attention.float().flatten(0, 2)[:, None]
        means = torch.nn.functional.avg_pool1d(flat, pooled, ceil_mode=True)
        attention = means.view(layers, heads, tokens, -1)
    each = layers * heads * attention.shape[-1]
    kept = max(1, min(tokens, most // each))
    return attention[:, :, :kept], pooled, kept


def _runs(seen: Inspection) -> list[list[Any]]:
    """The sequence as [kind, [texts]], or [kind, how many] for a clip's tokens."""
    runs: list[list[Any]] = []
    before = ""
    for piece, kind in zip(seen.layout.pieces, seen.layout.kinds, strict=True):
        if kind != before:
            runs.append([kind, 0 if is_audio(kind) else []])
        if is_audio(kind):
            runs[-1][1] += 1
        else:
            runs[-1][1].append(piece)
        before = kind
    return runs


def _matrix(values: Tensor, low: float, high: float | None = None) -> dict[str, Any]:
    """Values of any shape as bytes: value = low + byte / 255 * (high - low)."""
    values = values.float()
    high = values.max().item() if high is None else high
    span = max(high - low, 1e-12)
    codes = ((values - low) / span * 255).round().clamp(0, 255).to(torch.uint8)
    return {
        "shape": list(values.shape),
        "low": low,
        "high": high,
        "data": _text(codes.contiguous().numpy().tobytes()),
    }


def _fewer(values: Tensor, most: int) -> Tensor:
    """(rows, columns) averaged to at most so many columns."""
    every = -(-values.shape[-1] // most)
    if every == 1:
        return values
    return torch.nn.functional.avg_pool1d(values.float()[None], every, ceil_mode=True)[0]


def _envelope(waveform: Tensor) -> list[list[float]]:
    """Lowest and highest sample of each of at most WAVE_COLUMNS pieces."""
    every = max(1, -(-len(waveform) // WAVE_COLUMNS))
    pieces = waveform[: len(waveform) // every * every].view(-1, every)
    return [_rounded(pieces.amin(1)), _rounded(pieces.amax(1))]


def _wav(waveform: Tensor) -> bytes:
    """16-bit PCM; louder than full scale only if the clip is."""
    scale = 32767 / max(1.0, waveform.abs().max().item())
    samples = (waveform * scale).round().to(torch.int16).numpy().astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
