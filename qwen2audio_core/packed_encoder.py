"""Clips to the rows that stand for them in a prompt, for the engine: end to end, without padding.

encoder.py is its oracle. Every frame is computed once for all clips, and each clip attends to
itself. On a GPU a clip alone is heard by a CUDA graph of the next length that `padded` gives; what
stands behind its end is computed, and heard by nobody.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from qwen2audio_core.encoder import EncoderLayer, pool
from qwen2audio_core.errors import PromptError
from qwen2audio_core.frontend import HOP_LENGTH, MAX_FRAMES, ClipLengths, clip_lengths, log_mel
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.packing import projection
from qwen2audio_core.recording import Record, Recordings, padded


class PackedEncoder:
    """The audio tower and the projector of a model.

    kernels  the package qwen2audio_kernels, for attention over several clips in one launch where it
             fills the model's slots; None for plain PyTorch
    record   how to make the hearing of one clip repeatable without Python; None runs it each time
    """

    def __init__(self, model: Qwen2Audio, kernels: Any = None, record: Record | None = None):
        self._tower = model.audio_tower
        self._projector = model.multi_modal_projector
        self._config = model.config.audio
        self._longest = min(self._config.max_source_positions, MAX_FRAMES // 2)  # frames of a clip
        self._kernels = kernels
        weight = model.language_model.model.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._layers = [
            (
                layer,
                projection(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            )
            for layer in cast(list[EncoderLayer], list(self._tower.layers))
        ]
        self.recordings: Recordings | None = None
        if record is not None:  # what they take and give
            self.recordings = Recordings(record)
            new = partial(torch.zeros, device=self._device)
            self._mel = new(1, self._config.num_mel_bins, 2 * self._longest + 1)
            self._frames = new(1, dtype=torch.int64)  # of the clip
            self._heard = new(self._longest, model.config.text.hidden_size, dtype=self._dtype)

    def __call__(self, clips: Sequence[Tensor]) -> Tensor:
        """Waveforms to rows of the text width (sum of K, D): valid frames end to end, unpadded."""
        bins = self._config.num_mel_bins
        mels = [log_mel(clip.to(self._device), bins) for clip in clips]
        lengths = [clip_lengths(len(clip)) for clip in clips]
        if self.recordings is not None and len(clips) == 1:
            return self._encode_recorded(mels[0], lengths[0])
        frames = [one.conv_frames for one in lengths]
        varlen = self._ends(frames)

        def attend(attention_op: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if varlen is not None and attention_op is self._kernels.attention:
                y: Tensor = self._kernels.attention_varlen(q[0], k[0], v[0], *varlen)
                return y[None]
            clips = zip(*(part.split(frames, dim=1) for part in (q, k, v)), strict=True)
            return torch.cat([attention_op(*clip) for clip in clips], dim=1)

        pieces = [self._convolve(mel[None], count) for mel, count in zip(mels, frames, strict=True)]
        x = torch.cat(pieces, dim=1)
        return self._project(self._run(x, attend).split(frames, dim=1))

    def _ends(self, frames: Sequence[int]) -> tuple[Tensor, int] | None:
        """Of several clips for a kernel: where each ends, 0 in front, and the longest."""
        if self._kernels is None or len(frames) == 1:
            return None
        return torch.tensor([0, *accumulate(frames)], device=self._device), max(frames)

    def _encode_recorded(self, mel: Tensor, lengths: ClipLengths) -> Tensor:
        """The log-mel (M, F) of one clip to its rows (K, D), by what is recorded for its length."""
        assert self.recordings is not None
        count = min(padded(lengths.conv_frames), self._longest)
        self._mel[0, :, : mel.shape[1]] = mel
        self._mel[0, :, mel.shape[1] : 2 * count + 1] = 0
        self._frames.fill_(lengths.conv_frames)
        self.recordings.run(count, partial(self._encode_clip, count))
        return self._heard[: lengths.audio_tokens].clone()

    def _encode_clip(self, count: int) -> None:
        """What stands in _mel as `count` frames, of which _frames are heard, to _heard."""

        def attend(attention_op: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y: Tensor = attention_op(q, k, v, key_end=self._frames)
            return y

        x = self._convolve(self._mel[:, :, : 2 * count + 1], count)
        rows = self._project([self._run(x, attend)])
        needed = clip_lengths(2 * count * HOP_LENGTH).audio_tokens
        if len(rows) != needed:
            line = f"the clips need {len(rows)} audio tokens where the prompts hold {needed}"
            raise PromptError(line)
        self._heard[:needed] = rows

    def warm(self) -> None:
        """Record what clips of all lengths will need."""
        assert self.recordings is not None
        every = range(1, self._longest + 1)
        for count in sorted({min(padded(frames), self._longest) for frames in every}):
            self._frames.fill_(count)
            self.recordings.run(count, partial(self._encode_clip, count))

    def _convolve(self, mel: Tensor, frames: int) -> Tensor:
        """mel (1, M, F) to the first `frames` frames of the encoder's input, (1, frames, Da)."""
        tower = self._tower
        h = tower.gelu_op(tower.conv1(mel.to(tower.conv1.weight.dtype)))
        h = tower.gelu_op(tower.conv2(h))[:, :, :frames].transpose(1, 2)
        return h.contiguous() + tower.embed_positions.weight[:frames]

    def _run(self, x: Tensor, attend: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """All encoder layers on x (1, N, Da); `attend` gives attention_op of a layer its keys."""
        for layer, qkv in self._layers:
            attention = layer.self_attn
            heads = (*x.shape[:2], -1, attention.head_dim)
            parts = (part.view(heads) for part in qkv.split(layer.self_attn_layer_norm(x)))
            y = attend(attention.attention_op, *parts).reshape(x.shape)
            x = x + attention.out_proj(y)
            x = x + layer.fc2(layer.gelu_op(layer.fc1(layer.final_layer_norm(x))))
            if x.dtype == torch.float16:  # the published model's guard against overflow
                limit = torch.finfo(x.dtype).max - 1000
                x = x.clamp(-limit, limit)
        return x

    def _project(self, clips: Sequence[Tensor]) -> Tensor:
        """Audio states (1, T, Da) of clips, before they are pooled, to rows (sum of T // 2, D)."""
        states = self._tower.layer_norm(torch.cat([pool(clip) for clip in clips], dim=1))
        rows: Tensor = self._projector(states)[0]
        return rows.to(self._dtype)
