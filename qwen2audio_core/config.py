"""The numbers that fix the model's shape, read from a published config.json.

The published file leaves out every value that equals a default of the library it was written
with. Those defaults stand here, once, so that the file and this page together are complete.

Letters used in shape comments everywhere in this package:

    B batch          T query positions    H query heads         M mel bins       V vocabulary
    N samples        S key positions      G key/value heads     F mel frames
    A audio tokens   D text width         C channels per head   Da audio width   n clips
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen2audio_core.errors import CheckpointError


@dataclass(frozen=True)
class AudioConfig:
    """The audio tower: a Whisper-large-v3 encoder with an average pool behind it."""

    d_model: int = 1280  # Da, width of the residual stream
    encoder_layers: int = 32
    encoder_attention_heads: int = 20  # H, 64 channels each
    encoder_ffn_dim: int = 5120  # inner width of the two-layer MLP
    num_mel_bins: int = 128  # M
    max_source_positions: int = 1500  # rows of the position table: 30 s at 50 frames a second

    @property
    def head_dim(self) -> int:
        return self.d_model // self.encoder_attention_heads


@dataclass(frozen=True)
class TextConfig:
    """The language model: the geometry of the first Qwen-7B in the Qwen2 form."""

    hidden_size: int = 4096  # D, width of the residual stream
    intermediate_size: int = 11008  # inner width of the SwiGLU MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 32  # G; equal to H in the published model, fewer is grouped-query
    vocab_size: int = 156032  # V, padded beyond the tokenizer's 154,931
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192  # longest conversation in tokens, audio tokens included

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# What a config.json may leave out: the defaults of the classes that wrote the published file.
# They are not this page's defaults above (the published file overrides some of them).
_ABSENT_AUDIO = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
_ABSENT_TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
}
# Keys that would change the arithmetic if they held anything else. Unknown keys are ignored.
_FIXED_AUDIO = {"activation_function": "gelu"}
_FIXED_TEXT = {"hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Qwen2AudioConfig:
    """Shape of a whole model.

    The default values are those of Qwen2-Audio-7B and -7B-Instruct, which have the same shape.
    """

    audio: AudioConfig = AudioConfig()
    text: TextConfig = TextConfig()
    audio_token_id: int = 151646  # <|AUDIO|>, stands once for every 40 ms of sound

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> "Qwen2AudioConfig":
        """Read a config.json in the published layout.

        source   path of the file, or its parsed content
        returns  the shape; values the file leaves out are those the published library supplies
        errors   CheckpointError if it is not a Qwen2-Audio config, or one of its values is not
                 supported
        """
        if isinstance(source, dict):
            raw, where = source, "config"
        else:
            where = str(source)
            try:
                raw = json.loads(Path(source).read_text(encoding="utf-8"))
            except OSError as error:
                raise CheckpointError(f"{where}: cannot read it ({error.strerror})") from error
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(raw, dict) or raw.get("model_type") != "qwen2_audio":
            found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
            raise CheckpointError(f"{where}: model_type is {found!r}, expected 'qwen2_audio'")
        audio_raw = _section(raw, "audio_config", where)
        text_raw = dict(_section(raw, "text_config", where))
        # Later library versions moved the rotary base into a dictionary of its own.
        rope = text_raw.get("rope_parameters") or text_raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: text_config.rope_parameters must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{where}: rope_type {kind!r} is not supported, only 'default'")
        if "rope_theta" in rope:
            text_raw["rope_theta"] = rope["rope_theta"]
        audio = AudioConfig(
            **_values(audio_raw, _ABSENT_AUDIO, _FIXED_AUDIO, f"{where}: audio_config")
        )
        text = TextConfig(**_values(text_raw, _ABSENT_TEXT, _FIXED_TEXT, f"{where}: text_config"))
        head_dim = text_raw.get("head_dim")
        if head_dim not in (None, text.head_dim):
            raise CheckpointError(
                f"{where}: text_config.head_dim is {head_dim},"
                f" expected hidden_size / heads = {text.head_dim}"
            )
        token = raw.get("audio_token_index", raw.get("audio_token_id", 151646))
        config = cls(audio, text, _number(token, int, f"{where}: audio_token_index", minimum=0))
        config._check(where)
        return config

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json that describes this shape, with every value written out."""
        text = asdict(self.text)
        return {
            "architectures": ["Qwen2AudioForConditionalGeneration"],
            "model_type": "qwen2_audio",
            "audio_token_index": self.audio_token_id,
            "vocab_size": self.text.vocab_size,
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                **asdict(self.audio),
                "activation_function": "gelu",
                "scale_embedding": False,
            },
            "text_config": {
                "model_type": "qwen2",
                **text,
                "hidden_act": "silu",
                "use_sliding_window": False,
                "tie_word_embeddings": False,
            },
        }

    def _check(self, where: str) -> None:
        pairs = (
            ("audio_config.d_model", self.audio.d_model, self.audio.encoder_attention_heads),
            ("text_config.hidden_size", self.text.hidden_size, self.text.num_attention_heads),
            ("text_config heads", self.text.num_attention_heads, self.text.num_key_value_heads),
        )
        for name, whole, part in pairs:
            if whole % part:
                raise CheckpointError(f"{where}: {name} {whole} is not a multiple of {part}")
        if self.audio.max_source_positions < AudioConfig.max_source_positions:
            raise CheckpointError(
                f"{where}: audio_config.max_source_positions is {self.audio.max_source_positions},"
                f" and a clip of 30 s has {AudioConfig.max_source_positions} frames"
            )
        if self.text.head_dim % 2:
            raise CheckpointError(
                f"{where}: {self.text.head_dim} channels per head, expected an even number"
            )
        if self.audio_token_id >= self.text.vocab_size:
            raise CheckpointError(
                f"{where}: audio_token_index {self.audio_token_id} lies outside the"
                f" vocabulary of {self.text.vocab_size}"
            )


def _section(raw: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    section = raw.get(key)
    if section is None:
        section = {}
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: {key} must be an object, found {type(section).__name__}")
    return section


def _values(
    raw: dict[str, Any], absent: dict[str, Any], fixed: dict[str, Any], where: str
) -> dict[str, Any]:
    for key, expected in fixed.items():
        if raw.get(key, expected) != expected:
            raise CheckpointError(f"{where}.{key} is {raw[key]!r}, only {expected!r} is supported")
    return {
        key: _number(raw.get(key, default), type(default), f"{where}.{key}")
        for key, default in absent.items()
    }


def _number(value: Any, kind: type, where: str, minimum: int = 1) -> Any:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if good and kind is int:
        good = isinstance(value, int) and minimum <= value < 2**31
    elif good:
        good = 0 < value < float("inf")
    if not good:
        raise CheckpointError(f"{where} is {value!r}, expected a positive {kind.__name__}")
    return kind(value)
