"""A model whose behaviour is known: it hears beeps and names them, trained in seconds.

Its language has four words, beeps of one pitch each, 160 ms long, in faint noise, with pauses
between. The answer to a clip is their letters in order. Where it listened is therefore known, and
what claims to show that can be tested against it.
"""

import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch.nn.functional as F

from qwen2audio_core import assistant, chat, tiny
from qwen2audio_core.assistant import Assistant
from qwen2audio_core.chat import Prompt
from qwen2audio_core.config import AudioConfig, Qwen2AudioConfig, TextConfig
from qwen2audio_core.frontend import clip_lengths, log_mel

RATE = 16_000
PITCHES = {"a": 330.0, "b": 750.0, "c": 1600.0, "d": 3400.0}  # Hz
SECONDS = 1.28  # of the clips it was trained on
WORD = 0.16  # s, shorter than the windows of occlusion
RAW = "<|audio_bos|><|AUDIO|><|audio_eos|>?"
CONFIG = Qwen2AudioConfig(
    AudioConfig(
        d_model=48,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=96,
        num_mel_bins=32,
    ),
    TextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tiny.TINY.text.vocab_size,
    ),
    tiny.TINY.audio_token_id,
)


def clip(words: str, starts: list[float], seconds: float, seed: int) -> torch.Tensor:
    """Beeps at these times in faint noise."""
    generator = torch.Generator().manual_seed(seed)
    sound = 0.003 * torch.randn(int(seconds * RATE), generator=generator)
    length = int(WORD * RATE)
    fade = (torch.hann_window(length, periodic=False) * 8).clamp(max=1)
    moments = torch.arange(length) / RATE
    for word, start in zip(words, starts, strict=True):
        first = int(start * RATE)
        sound[first : first + length] += 0.2 * fade * (2 * torch.pi * PITCHES[word] * moments).sin()
    return sound


def example(
    words: int, seed: int, seconds: float = SECONDS
) -> tuple[torch.Tensor, str, list[float]]:
    """(waveform, letters, when each begins); different words, with pauses of at least 80 ms."""
    generator = torch.Generator().manual_seed(seed)
    letters = "".join("abcd"[i] for i in torch.randperm(4, generator=generator)[:words])
    free = seconds - words * (WORD + 0.08)
    gaps = (free * torch.rand(words, generator=generator)).sort().values.tolist()
    starts = [gap + i * (WORD + 0.08) for i, gap in enumerate(gaps)]
    return clip(letters, starts, seconds, seed), letters, starts


def prompt_of(waveform: torch.Tensor, one: Assistant) -> Prompt:
    return chat.encode_raw(RAW, [waveform], one.tokenizer, sampling_rate=RATE)


def train(
    steps: int = 180, batch: int = 16, seconds: float = SECONDS, log: bool = False
) -> Assistant:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small operations gain nothing from more
    torch.manual_seed(0)
    folder = Path(mkdtemp())
    tiny.write_random(folder / "toy", CONFIG, dtype=torch.float32, std=0.08)
    one = assistant.load(str(folder / "toy"), device="cpu")
    model = one.model
    end = one.tokenizer.id_of("<|im_end|>")
    one.settings = replace(one.settings, do_sample=False, repetition_penalty=1.0, max_new_tokens=8)
    lengths = clip_lengths(int(seconds * RATE))
    bos, audio, eos = (
        one.tokenizer.id_of(name) for name in ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    )
    before = [bos, *[audio] * lengths.audio_tokens, eos, *one.tokenizer.encode("?")]
    known = []  # mels of all beeps
    for seed in range(1000, 1000 + 600):
        waveform, letters, _ = example(1 + seed % 3, seed, seconds)
        known.append(
            (log_mel(waveform, CONFIG.audio.num_mel_bins), [*one.tokenizer.encode(letters), end])
        )
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    began = time.perf_counter()
    for step in range(steps):
        picked = [known[i] for i in torch.randint(len(known), (batch,), generator=generator)]
        mel = torch.stack([m for m, _ in picked])
        longest = max(len(a) for _, a in picked)
        ids = torch.tensor([before + a + [end] * (longest - len(a)) for _, a in picked])
        labels = torch.tensor([a + [-100] * (longest - len(a)) for _, a in picked])
        x = model.embed(ids, mel, torch.full((batch,), lengths.conv_frames))
        positions = torch.arange(ids.shape[1])[None]
        x = model.language_model.model(x, positions)[:, len(before) - 1 : -1]
        logits = model.language_model.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if log and step % 25 == 24:
            print(
                step + 1, round(loss.item(), 4), round(time.perf_counter() - began, 1), flush=True
            )
    torch.set_num_threads(threads)
    return one


@cache
def heard() -> Assistant:
    """The trained toy, once for all tests of a process."""
    return train()


if __name__ == "__main__":
    one = train(log=True)
    right = 0
    for seed in range(60):
        waveform, letters, _ = example(1 + seed % 3, seed)
        reply = one.stream_prompts([prompt_of(waveform, one)]).finished()[0]
        right += reply.text == letters
    print("right", right, "of 60")
