"""Which part of the sound did it listen to? Three answers, for chosen tokens of an answer.

    batch = answered(prompt, reply.ids, model)
    found = occlusion(model, batch, tokens)        tokens: positions in batch.ids, layout["answer"]
    found.weights[0], found.peak(0)                a weight for each 40 ms; the second it points to

rollout     how much attention flows from the clip to the token. One run, no gradient; says where
            the model looked, not what for
gradient    how much the token's score changes with the log-mel, times how loud it is there. A few
            runs forward, and as many back for each token
occlusion   how much the token's score falls where 200 ms are replaced by silence. A run for every
            window; the only one of the three that tries what it claims

What a token's score is: its log-odds, log p - log(1 - p), which unlike the probability does not
stand still where the model is sure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen2audio_core import chat
from qwen2audio_core.chat import Batch, Prompt
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import SECONDS_PER_TOKEN
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.points import Change, Point
from qwen2audio_core.probe import hooks

FRAMES_PER_TOKEN = 4  # mel frames of 10 ms


@dataclass(frozen=True)
class Attribution:
    """Weights over time.

    weights  (K, A)  a row for each token asked about, a column for each audio token of all clips
             in their order; 40 ms each. Higher: it mattered more. Signed, where the method is
    """

    weights: Tensor
    step: float = SECONDS_PER_TOKEN

    def peak(self, token: int = 0, width: float = 0.2) -> float:
        """The second in the middle of the `width` seconds that weigh most together."""
        row = self.weights[token].clamp(min=0).double()
        span = max(1, min(round(width / self.step), len(row)))
        sums = row.unfold(0, span, 1).sum(-1)
        return (int(sums.argmax()) + span / 2) * self.step


def answered(prompt: Prompt, answer: Sequence[int], model: Qwen2Audio, pad_id: int = 0) -> Batch:
    """One row of prompt and answer, on the model's device: what the methods here take."""
    weight = model.language_model.model.embed_tokens.weight  # the head's may be codes
    whole = replace(prompt, ids=[*prompt.ids, *answer])
    bins = model.config.audio.num_mel_bins
    return chat.collate([whole], pad_id, device=weight.device, num_mel_bins=bins)


def log_odds(logits: Tensor, ids: Tensor) -> Tensor:
    """log p - log(1 - p) of the tokens ids (...,) under logits (..., V), in float32."""
    logits = logits.float()
    chosen = logits.gather(-1, ids[..., None])
    others = logits.scatter(-1, ids[..., None], float("-inf"))
    return chosen[..., 0] - others.logsumexp(-1)


def rollout(model: Qwen2Audio, batch: Batch, tokens: Sequence[int]) -> Attribution:
    """Attention rollout, through all layers of the language model and of the audio tower.

        flow = (r + (1 - r) attention) flow of the layer below        attention: mean of the heads

    says what of the clip arrived at the position that wrote the token. r is what the layer leaves
    as it was, |x|^2 / (|x|^2 + |a|^2) of each position's stream x and of what attention adds to it,
    a. With the fixed r = 1/2 of the first description (Abnar and Zuidema, arXiv 2005.00928) the
    audio tower, which changes its stream little, blurs all of it; that norms must count is from
    Kobayashi et al., arXiv 2109.07152.
    """
    places, tokens = _check(model, batch, tokens)
    flow: dict[str, Tensor] = {}
    stream: dict[str, Tensor] = {}
    mean: dict[str, Tensor] = {}

    def watch(tower: str, prefix: str) -> dict[str, Change]:
        def before(x: Tensor, point: Point) -> None:
            stream[tower] = x.detach().float().square().sum(-1)  # (B, T)

        def attend(weights: Tensor, point: Point) -> None:
            mean[tower] = weights.detach().float().mean(1)  # (B, T, T)

        def behind(x: Tensor, point: Point) -> None:
            added = x.detach().float().square().sum(-1)
            kept = (stream[tower] / (stream[tower] + added).clamp(min=1e-20))[..., None]
            layer = (1 - kept) * mean.pop(tower) + torch.diag_embed(kept[..., 0])
            flow[tower] = layer @ flow[tower] if tower in flow else layer

        return {
            f"{prefix}blocks.*.hook_resid_pre": before,
            f"{prefix}blocks.*.attn.hook_pattern": attend,
            f"{prefix}blocks.*.hook_attn_out": behind,
        }

    with torch.no_grad(), hooks(model, watch("text", "") | watch("audio", "audio.")):
        _score(model, batch, batch.mel, tokens)
    readers = torch.tensor(tokens, device=batch.ids.device) - 1  # they wrote the tokens
    of_tokens = flow["text"][0, readers][:, places]  # (K, A)
    assert batch.conv_frames is not None
    heard, first = [], 0
    for clip, frames in enumerate(batch.conv_frames.tolist()):
        many = frames // 2
        frame_flow = flow["audio"][clip, : 2 * many, : 2 * many]
        pooled = frame_flow.reshape(many, 2, many, 2).mean(1).sum(-1)  # (A, A)
        heard.append(of_tokens[:, first : first + many] @ pooled)
        first += many
    return Attribution(torch.cat(heard, 1).cpu())


def gradient(
    model: Qwen2Audio,
    batch: Batch,
    tokens: Sequence[int],
    *,
    steps: int = 8,
    rows: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """Gradient of each token's log-odds by the log-mel, times the log-mel's height over silence.

    Summed over the mel bins. Positive: sound there spoke for the token; negative: against it.
    Silence is the clip's floor, 8 decades below its loudest.

    steps    1: the plain gradient x input of Simonyan et al., arXiv 1312.6034, at the clip itself.
             More: the mean of the gradients at that many loudnesses from silence to the clip, the
             integrated gradients of Sundararajan et al., arXiv 1703.01365. Where the model is sure
             the plain gradient says little (tests/toy.py: it points to 9 of 30 beeps, 8 steps to
             all of them), so that 8 are the default
    rows     steps run at once; their activations are kept for the way back, so 1 for large models
    on_progress  called with (gradients taken, gradients in all)
    """
    maps = gradient_maps(model, batch, tokens, steps=steps, rows=rows, on_progress=on_progress)
    return Attribution(torch.stack([_per_token(batch, one.sum(1)) for one in maps]))


def gradient_maps(
    model: Qwen2Audio,
    batch: Batch,
    tokens: Sequence[int],
    *,
    steps: int = 8,
    rows: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What `gradient` sums, before it does: (K, n, M, F), on the CPU."""
    _, tokens = _check(model, batch, tokens)
    assert batch.mel is not None
    if steps < 1 or rows < 1:
        raise InputError(f"steps are {steps}, {rows} at once: both must be at least 1")
    with torch.inference_mode(False), torch.enable_grad():
        floor = _floor(batch)
        height = batch.mel.detach().clone() - floor
        total = torch.zeros(len(tokens), *height.shape)
        parts = [(step + 0.5) / steps if steps > 1 else 1.0 for step in range(steps)]
        for first in range(0, steps, rows):
            group = torch.tensor(parts[first : first + rows], device=height.device)
            mel = (floor + group[:, None, None, None] * height).requires_grad_(True)
            scores = _score(model, batch, mel.flatten(0, 1), tokens, len(group)).view(
                len(group), -1
            )
            for i in range(len(tokens)):
                # A copy's score depends on its own mel alone: one way back serves all of them.
                (slope,) = torch.autograd.grad(
                    scores[:, i].sum(), mel, retain_graph=i < len(tokens) - 1
                )
                total[i] += slope.sum(0).float().cpu()
                if on_progress is not None:
                    on_progress(first * len(tokens) + (i + 1) * len(group), steps * len(tokens))
    return total / steps * height.float().cpu()


def occlusion(
    model: Qwen2Audio,
    batch: Batch,
    tokens: Sequence[int],
    *,
    seconds: float = 0.2,
    hop: float = 0.08,
    rows: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """Replace `seconds` of the log-mel by silence, everywhere in turn, and see the log-odds fall.

    hop          seconds between two windows; an audio token gets the mean of those that cover it
    rows         windows run at once
    on_progress  called with (windows done, windows in all)
    Zeiler and Fergus, arXiv 1311.2901, section 4.2.
    """
    places, tokens = _check(model, batch, tokens)
    assert batch.mel is not None and batch.conv_frames is not None
    width, step = (max(1, round(s / SECONDS_PER_TOKEN)) for s in (seconds, hop))
    # (clip, first audio token, behind the last)
    windows = [
        (clip, first, min(first + width, many))
        for clip, many in enumerate((batch.conv_frames // 2).tolist())
        for first in range(0, max(1, many - width + step), step)
    ]
    floor = _floor(batch)
    ends = [0, *(batch.conv_frames // 2).cumsum(0).tolist()]
    total = torch.zeros(len(tokens), len(places))
    covered = torch.zeros(len(places))
    with torch.inference_mode():
        whole = _score(model, batch, batch.mel, tokens)
        for begin in range(0, len(windows), rows):
            group = windows[begin : begin + rows]
            mel = batch.mel.repeat(len(group), 1, 1, 1)  # (g, n, M, F)
            for one, (clip, first, last) in zip(mel, group, strict=True):
                span = slice(first * FRAMES_PER_TOKEN, last * FRAMES_PER_TOKEN)
                one[clip, :, span] = floor[clip]
            scores = _score(model, batch, mel.flatten(0, 1), tokens, len(group))  # (g, K)
            for (clip, first, last), score in zip(group, scores.view(len(group), -1), strict=True):
                span = slice(ends[clip] + first, ends[clip] + last)
                total[:, span] += (whole - score).cpu()[:, None]
                covered[span] += 1
            if on_progress is not None:
                on_progress(begin + len(group), len(windows))
    return Attribution(total / covered.clamp(min=1))


def _check(model: Qwen2Audio, batch: Batch, tokens: Sequence[int]) -> tuple[Tensor, list[int]]:
    """(positions of the audio tokens, the tokens as a list)."""
    if len(batch.ids) != 1 or batch.mel is None:
        raise InputError("one conversation at a time, with at least one clip, can be attributed")
    tokens = list(tokens)
    if not tokens or not all(0 < token < batch.ids.shape[1] for token in tokens):
        raise InputError(
            f"tokens to explain are positions 1 to {batch.ids.shape[1] - 1}, got {tokens}"
        )
    return (batch.ids[0] == model.config.audio_token_id).nonzero()[:, 0], tokens


def _score(
    model: Qwen2Audio, batch: Batch, mel: Tensor | None, tokens: list[int], copies: int = 1
) -> Tensor:
    """Log-odds (K,) of the tokens, or (copies * K,) with so many versions of the clips."""
    assert batch.conv_frames is not None
    ids = batch.ids.expand(copies, -1)
    x = model.embed(ids, mel, batch.conv_frames.repeat(copies))
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    at = torch.tensor(tokens, device=ids.device)
    hidden = model.language_model.model(x, positions)[:, at - 1]
    return log_odds(model.language_model.lm_head(hidden), ids[:, at]).flatten()


def _floor(batch: Batch) -> Tensor:
    """(n, 1, 1): the log-mel of silence in each clip. See frontend.log_mel."""
    assert batch.mel is not None and batch.conv_frames is not None
    rows = [
        mel[:, : 2 * frames].amax() - 2.0  # 8 decades, divided by 4
        for mel, frames in zip(batch.mel, batch.conv_frames.tolist(), strict=True)
    ]
    return torch.stack(rows)[:, None, None]


def _per_token(batch: Batch, frames: Tensor) -> Tensor:
    """Sums of (n, F) mel frames for each audio token of all clips, (A,)."""
    assert batch.conv_frames is not None
    counts = (batch.conv_frames // 2).tolist()
    rows = [
        row[: many * FRAMES_PER_TOKEN].view(many, FRAMES_PER_TOKEN).sum(-1)
        for row, many in zip(frames, counts, strict=True)
    ]
    return torch.cat(rows)
