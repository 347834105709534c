"""The whole model: audio tower, projector and language model, and the splice that joins them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qwen2audio_core.cache import KVCache
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.decoder import CausalLM
from qwen2audio_core.encoder import AudioEncoder
from qwen2audio_core.errors import PromptError
from qwen2audio_core.projector import MultiModalProjector


class Qwen2Audio(nn.Module):
    """Sound and text in, logits out. Module names are those of the published checkpoint."""

    def __init__(self, config: Qwen2AudioConfig):
        super().__init__()
        self.config = config
        self.audio_tower = AudioEncoder(config.audio)
        self.multi_modal_projector = MultiModalProjector(config)
        self.language_model = CausalLM(config.text)

    def forward(
        self,
        ids: Tensor,
        mel: Tensor | None = None,
        conv_frames: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Score every next token.

        ids             (B, T)  integers; each clip's place holds its audio token A times
        mel             (n, M, F)  log-mels of all clips, in the order of their places in ids
        conv_frames     (n,)  integers, frontend.clip_lengths(samples).conv_frames of each clip
        attention_mask  (B, T)  1 for real tokens and 0 for padding at the left or the right of a
                        row; None where nothing is padded. With a cache, give it with the prompt
                        and not again; with a cache or last_only, padding is at the left.
        cache           an empty one to fill, or one that holds the tokens before ids; advanced by T
        last_only       compute the last position alone, all that generating needs
        returns         logits (B, T, V), or (B, 1, V) with last_only, in the weights' dtype
        errors          PromptError where clips and places differ; ValueError for a broken mask
        """
        if cache is not None and cache.length > 0 and mel is None and ids.shape[1] == 1:
            # A single id is one that was just generated: an ordinary one, whichever it is, and
            # looking at it would make the GPU wait at every token.
            x = self.language_model.model.embed_tokens(ids)
        else:
            x = self.embed(ids, mel, conv_frames)
        return self.decode(x, attention_mask, cache, last_only)

    def embed(
        self, ids: Tensor, mel: Tensor | None = None, conv_frames: Tensor | None = None
    ) -> Tensor:
        """The first half of forward: ids (B, T) and clips to embeddings (B, T, D)."""
        x = self.language_model.model.embed_tokens(ids)
        is_audio = ids == self.config.audio_token_id
        if mel is not None:
            if conv_frames is None:
                raise ValueError("mel was given without conv_frames, the valid frames of each clip")
            return splice(x, is_audio, self.encode_audio(mel, conv_frames), conv_frames // 2)
        if bool(is_audio.any()):
            raise PromptError("the prompt has places for audio, but no clip was given")
        return x

    def decode(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """The second half of forward: embeddings (B, T, D) to logits. Arguments as there."""
        if last_only and attention_mask is not None:
            refuse_right_padding(attention_mask, "last_only")
        x = self.hidden(x, attention_mask, cache)
        return self.language_model.lm_head(x[:, -1:] if last_only else x)

    def hidden(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """What lm_head reads: embeddings (B, T, D) to normed hidden states (B, T, D)."""
        if cache is not None and cache.length > 0:
            if attention_mask is not None:
                raise ValueError(
                    "attention_mask belongs to the prompt; the cache remembers its padding"
                )
            positions = torch.arange(cache.length, cache.length + x.shape[1], device=x.device)[None]
            key_start = cache.key_start
            if key_start is not None:
                positions = positions - key_start[:, None]
        else:
            positions, key_start = read_mask(x, attention_mask)
            if cache is not None:
                if attention_mask is not None:
                    refuse_right_padding(attention_mask, "a cache")
                cache.key_start = key_start
        x = self.language_model.model(x, positions, key_start, cache)
        if cache is not None:
            cache.advance(x.shape[1])
        return x

    def encode_audio(self, mel: Tensor, conv_frames: Tensor) -> Tensor:
        """Clips to rows of the text width: mel (n, M, F), conv_frames (n,) -> (n, A, D)."""
        return self.multi_modal_projector(self.audio_tower(mel, conv_frames))


def splice(
    text_embeds: Tensor, is_audio: Tensor, audio_embeds: Tensor, audio_tokens: Tensor
) -> Tensor:
    """Put the clips' rows in the places held for them.

    text_embeds   (B, T, D)
    is_audio      (B, T)  bool, the places; each unbroken run of them belongs to one clip
    audio_embeds  (n, A, D)  of which clip i fills audio_tokens[i] rows
    audio_tokens  (n,)  integers
    returns       (B, T, D)
    errors        PromptError where a run and its clip differ in length, or in number
    """
    begins = is_audio.clone()
    begins[:, 1:] &= ~is_audio[:, :-1]
    run = begins.flatten().cumsum(0)[is_audio.flatten()] - 1  # which run each place is in
    check_places(torch.bincount(run).tolist(), audio_tokens.tolist())
    filled = torch.arange(audio_embeds.shape[1], device=audio_tokens.device) < audio_tokens[:, None]
    rows = audio_embeds[filled.to(audio_embeds.device)].to(text_embeds.dtype)
    return text_embeds.masked_scatter(is_audio[..., None], rows)


def check_places(held: Sequence[int], needed: Sequence[int]) -> None:
    """Raise PromptError where runs of places and clips differ in number, or a pair in length."""
    if len(held) != len(needed):
        line = f"{len(needed)} clips were given, the prompt has places for {len(held)}"
        if len(held) < len(needed) and sum(held) == sum(needed) and all(needed):
            line += (
                ": the places of two clips touch and count as one;"
                " put <|audio_eos|><|audio_bos|> between them"
            )
        raise PromptError(line)
    for i, (places, tokens) in enumerate(zip(held, needed, strict=True), start=1):
        if places != tokens:
            raise PromptError(
                f"clip {i} needs {tokens} audio tokens, the prompt holds {places} for it"
            )


def read_mask(x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Positions (B or 1, T) of the real tokens, and where each row starts (None for 0)."""
    columns = torch.arange(x.shape[1], device=x.device)
    if attention_mask is None:
        return columns[None], None
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, the ids are {tuple(x.shape[:2])}"
        )
    real = attention_mask.to(x.device) != 0
    if not bool(real.any(-1).all()):
        raise ValueError("attention_mask has a row of padding alone: 1 is a token, 0 is padding")
    start = real.int().argmax(-1)  # (B,)
    end = start + real.sum(-1)
    if not bool((real == (columns >= start[:, None]) & (columns < end[:, None])).all()):
        raise ValueError(
            "attention_mask has a hole: padding belongs at the left or the right of a row"
        )
    positions = (columns - start[:, None]).clamp(min=0)
    return positions, start if bool(start.any()) else None


def refuse_right_padding(attention_mask: Tensor, what: str) -> None:
    """Raise ValueError where a row's last position is padding."""
    if not bool(attention_mask[..., -1].all()):
        raise ValueError(
            f"attention_mask pads at the right; with {what} every row must end in a real token:"
            " pad at the left"
        )
