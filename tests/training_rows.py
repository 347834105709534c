"""Small data for the training tests: tones as clips, rows about them, and a checkpoint to train."""

import json
import math
import wave
from pathlib import Path

import torch

from qwen2audio_core import tiny
from qwen2audio_core.config import AudioConfig, Qwen2AudioConfig, TextConfig
from qwen2audio_core.training import loop

SHAPE = Qwen2AudioConfig(
    AudioConfig(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64),
    TextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=tiny.TINY.text.vocab_size,
        max_position_embeddings=256,
    ),
)


def tone(path: Path, hertz: float, seconds: float) -> str:
    time = torch.arange(round(16_000 * seconds)) / 16_000
    samples = (8000 * torch.sin(2 * math.pi * hertz * time)).to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(samples.numpy().tobytes())
    return path.name


def write_lines(path: Path, rows: list) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def official_rows(folder: Path, count: int) -> list[dict]:
    """Clips of 0.3 s and up whose pitch is the answer."""
    rows = []
    for i in range(count):
        seconds = 0.3 + 0.07 * (i % 5)
        rows.append(
            {
                "audio": tone(folder / f"{i}.wav", 200 + 150 * (i % 4), seconds),
                "prompt": "Which tone?",
                "gt": "abcd"[i % 4] * (1 + i % 3),
                "source": "asr_tone",
                "seconds": seconds,
            }
        )
    return rows


def chat_row(clips: list[str], answers: list[str], **more) -> dict:
    turns = []
    for i, answer in enumerate(answers):
        place = "<audio>" * len(clips) if i == 0 else ""
        turns += [
            {"role": "user", "content": f"{place}Question {i}?"},
            {"role": "assistant", "content": answer},
        ]
    return {"messages": turns, "audios": clips, **more}


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    tiny.write_random(folder, SHAPE, seed=0, dtype=dtype, std=0.2)
    return str(folder)


def settings(base: str, data: list[str], out: Path, **more) -> loop.Settings:
    """A short run that is the same every time, in float32."""
    plain = {
        "stage": "pretrain",
        "steps": 4,
        "lr": 1e-2,
        "warmup": 2,
        "batch_seconds": 2.0,
        "bf16": False,
        "device": "cpu",
        "samples": 0,
    }
    return loop.Settings(base, data, str(out), **{**plain, **more})
