"""Spectrograms as PNG, clips and tokens as HTML. Nothing here loads anything from elsewhere."""

import struct
import wave
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2audio_core.frontend import SAMPLE_RATE, log_mel

# Dark to light through violet and orange, equally spaced; between them the palette is linear.
INFERNO = (
    *((0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99)),
    *((212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164)),
)
MAX_WIDTH = 1200  # pixels; of a longer clip neighbouring frames share one


def palette() -> bytes:
    """256 colours, 3 bytes each."""
    anchors = torch.tensor(INFERNO, dtype=torch.float32).T[None]  # (1, 3, anchors)
    colours = F.interpolate(anchors, 256, mode="linear", align_corners=True)
    return bytes(colours[0].T.round().to(torch.uint8).flatten().tolist())


def spectrogram(pieces: Sequence[Tensor]) -> bytes:
    """What the model sees of a clip, as a PNG: one row per mel bin, low notes below.

    pieces   waveforms (N,) at 16 kHz, each of at most 30 s; they stand side by side
    """
    mel = torch.cat([log_mel(piece.cpu()) for piece in pieces], dim=1)  # (M, F)
    if mel.shape[1] > MAX_WIDTH:
        mel = F.adaptive_max_pool1d(mel, MAX_WIDTH)
    top = mel.max()
    shade = ((mel - top) / 2 + 1).clamp(0, 1)  # log_mel ends 2 below the maximum
    return png((shade.flip(0) * 255).round().to(torch.uint8))


def png(pixels: Tensor) -> bytes:
    """An image (rows, columns) of indices into `palette`. W3C PNG, section 5."""
    height, width = pixels.shape
    rows = F.pad(pixels, (1, 0))  # each row begins with its filter, 0 for none
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),  # 8 bits, of a palette
        (b"PLTE", palette()),
        (b"IDAT", zlib.compress(rows.contiguous().numpy().tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def write_wav(path: Path, pieces: Sequence[Tensor]) -> None:
    """What the model hears of a clip, for every browser to play: mono, 16 kHz, 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        for piece in pieces:
            pcm = (piece.cpu().clamp(-1, 1) * 32767).round().to(torch.int16)
            file.writeframes(pcm.numpy().astype("<i2", copy=False).tobytes())


def file_url(path: Path) -> str:
    """Where the page finds one of the server's files; relative, for a proxy may stand before it."""
    return "gradio_api/file=" + quote(str(path))


def clip_card(name: str, facts: str, wav: Path, picture: Path, remove: str = "") -> str:
    """One clip: its spectrogram, what is known of it, and a player.

    remove   label of a button that takes it away; the button's data-clip is the wav's name
    """
    button = (
        f'<button class="q2a-remove" data-clip="{escape(wav.name)}" title="{escape(remove)}"'
        f' aria-label="{escape(remove)}: {escape(name)}">&times;</button>'
        if remove
        else ""
    )
    return (
        f'<figure class="q2a-clip"><img src="{file_url(picture)}" alt="">'
        f'<figcaption><bdi class="q2a-name" title="{escape(name)}">{escape(name)}</bdi>'
        f'<span class="q2a-facts">{escape(facts)}</span>{button}</figcaption>'
        '<audio controls controlslist="nodownload noplaybackrate" preload="metadata"'
        f' aria-label="{escape(name)}" src="{file_url(wav)}"></audio></figure>'
    )
