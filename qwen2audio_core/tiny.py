"""The small model that ships with the project, and random checkpoints in the published layout.

`trained` is the default model: nine million parameters, taught from nothing on synthetic speech
and sounds by scripts/train_tiny.sh. MODEL_CARD.md beside it says what it can do.

The words of random checkpoints mean nothing. They are complete all the same: weights, settings and
a tokenizer, so that everything that runs on the published checkpoint runs on them.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen2audio_core.config import AudioConfig, Qwen2AudioConfig, TextConfig
from qwen2audio_core.errors import CheckpointError
from qwen2audio_core.hub import TOKENIZER_FILES, inside
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.saving import write
from qwen2audio_core.tokenizer import byte_symbols
from qwen2audio_core.weights import preprocessor_config, read_headers, without_storage

# The published added tokens in their order. Their ids follow the base vocabulary.
SPECIAL_TOKENS = [
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "AUDIO", "audio_bos", "audio_eos", "sil"),
        *(f"{i / 100:.2f}" for i in range(3001)),  # timestamps, 0.00 to 30.00 s
        *(
            f"{side}of{edge}"
            for edge in ("entityvalue", "entitytype", "word", "time")
            for side in ("start", "end")
        ),
        *(f"midi_pitch_{i}" for i in range(128)),
        *(f"midi_velocity_{i}" for i in range(128)),
        "unknown",
        "zh_tw",
        *("en", "zh", "de", "es", "ko", "fr", "ja", "it", "ru", "pt", "ar", "yue", "wuu", "nan"),
    )
]
BYTES = 256  # the tiny tokenizer's base vocabulary: every byte a token, nothing merged
LETTERS = (*range(64, 90), 220)  # of them, a to z and the space

WARNINGS = {  # what to say where one of the small models answers
    "tiny": "This is the project's own small model: a few hundred words and sounds, learnt from"
    " synthetic speech. It errs on all else.",
    "random": "This is the small random model: it shows that everything runs, its words mean"
    " nothing.",
}

TINY = Qwen2AudioConfig(
    AudioConfig(d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128),
    TextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=-(-(BYTES + len(SPECIAL_TOKENS)) // 64) * 64,
    ),
    audio_token_id=BYTES + SPECIAL_TOKENS.index("<|AUDIO|>"),
)


def write_random(
    folder: str | Path,
    config: Qwen2AudioConfig = TINY,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    std: float = 0.02,
    tokenizer: str | Path | None = None,
    legible: bool = False,
    max_shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of random weights, one tensor in memory at a time.

    config     its audio_token_id is replaced by the tokenizer's id of <|AUDIO|>
    seed       each tensor's values depend on it and on the tensor's name alone
    std        of every weight and bias; the norms' weights are spread so around 1
    tokenizer  folder to copy the tokenizer's files from; None for the byte-level tokenizer
    legible    with the byte-level tokenizer: silence the output head but for letters, so that the
               random words can at least be read
    errors     CheckpointError where the tokenizer is not usable or the folder cannot be written
    """
    files = byte_tokenizer() if tokenizer is None else _copy_tokenizer(Path(tokenizer))
    ids = {
        entry["content"]: int(i)
        for i, entry in json.loads(files["tokenizer_config.json"])["added_tokens_decoder"].items()
    }
    if max(ids.values()) >= config.text.vocab_size:
        raise CheckpointError(
            f"{tokenizer or 'byte tokenizer'}: ids reach {max(ids.values())}, the config's"
            f" vocabulary ends at {config.text.vocab_size - 1}"
        )
    config = replace(config, audio_token_id=ids["<|AUDIO|>"])
    end, turn_end = ids["<|endoftext|>"], ids["<|im_end|>"]
    # The values of the published file.
    settings = {
        "do_sample": not legible,  # a draw would leave the letters
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.5,
        "repetition_penalty": 1.1,
        "eos_token_id": [end, turn_end],
        "pad_token_id": end,
    }
    files["generation_config.json"] = _json(settings)
    files["preprocessor_config.json"] = _json(preprocessor_config(config))
    state = without_storage(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    write(
        folder,
        config,
        shapes,
        random_tensors(shapes, seed, dtype, std, LETTERS if legible else None),
        dtype,
        files,
        max_shard_bytes,
        overwrite,
    )


def random_tensors(
    shapes: dict[str, tuple[int, ...]],
    seed: int,
    dtype: torch.dtype,
    std: float,
    words: Sequence[int] | None = None,
) -> Callable[[str], Tensor]:
    """name -> tensor, normal around 0 (norms' weights: around 1), repeatable tensor by tensor.

    words  ids whose rows of the output head are kept, the others are zero; None for all
    """

    def make(name: str) -> Tensor:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        tensor = torch.empty(shapes[name], dtype=dtype).normal_(mean, std, generator=generator)
        if words is None or not name.endswith("lm_head.weight"):
            return tensor
        kept = torch.zeros(len(tensor), dtype=torch.bool)
        kept[list(words)] = True
        return tensor.masked_fill_(~kept[:, None], 0.0)

    return make


def byte_tokenizer() -> dict[str, bytes]:
    """The files of a tokenizer of 256 bytes and the published added tokens, name -> content."""
    plain = {
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(BYTES + i): {"content": token, **plain} for i, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": TINY.text.max_position_embeddings,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "split_special_tokens": False,
        "unk_token": None,
    }
    return {
        "vocab.json": _json({symbol: i for i, symbol in enumerate(byte_symbols())}),
        "merges.txt": b"#version: 0.2\n",
        "tokenizer_config.json": _json(config),
    }


def which(model: Qwen2Audio) -> str:
    """Whether a model is "tiny" or "random", in whatever dtype or bits; "" for any other."""
    shapes = {"tiny": Qwen2AudioConfig.from_json(trained() / "config.json"), "random": TINY}
    for name, shape in shapes.items():
        if model.config == shape:
            place = trained() if name == "tiny" else folder()
            own = model.audio_tower.conv1.weight.detach().cpu()  # never quantised
            stored = read_headers(place)["audio_tower.conv1.weight"].read()
            same = torch.allclose(own.float(), stored.float(), rtol=0.01, atol=1e-6)
            return name if same else ""
    return ""


def trained() -> Path:
    """The folder of the small trained model, which is part of the package."""
    return Path(__file__).parent / "assets" / "tiny"


def folder() -> Path:
    """A tiny random checkpoint, made in the user's cache the first time it is asked for."""
    recipe = json.dumps([3, TINY.to_json()], sort_keys=True).encode()  # 3: raise it to make anew
    name = f"random-{hashlib.sha256(recipe).hexdigest()[:12]}"
    caches = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen2audio",
        Path(tempfile.gettempdir())
        / f"qwen2audio-{os.getuid() if hasattr(os, 'getuid') else 'user'}",
    )
    for i, cache in enumerate(caches):
        made = cache / name
        try:
            if not made.is_dir():
                # float32 is the fastest dtype of a small model on most CPUs; at this width a
                # spread of 1/8 gives logits that differ enough to be worth drawing from.
                write_random(made, seed=0, dtype=torch.float32, std=0.125, legible=True)
            return made
        except CheckpointError:
            if made.is_dir():  # another process was quicker
                return made
            if i == len(caches) - 1:
                raise
    raise AssertionError("the last cache either returns or raises")


def _copy_tokenizer(source: Path) -> dict[str, bytes]:
    """Content of the tokenizer's files in a folder, the audio tokens known to be among them."""
    names = [name for name in TOKENIZER_FILES if os.path.lexists(source / name)]
    if "tokenizer_config.json" not in names or not {"tokenizer.json", "vocab.json"} & set(names):
        raise CheckpointError(
            f"{source}: no tokenizer here; expected tokenizer_config.json and either vocab.json"
            " with merges.txt or tokenizer.json"
        )
    files = {name: inside(source, name).read_bytes() for name in names}
    try:
        added = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"].values()
        contents = {entry["content"] for entry in added}
    except (ValueError, KeyError, TypeError, AttributeError):
        contents = set()
    if not {"<|AUDIO|>", "<|endoftext|>", "<|im_end|>"} <= contents:
        raise CheckpointError(
            f"{source / 'tokenizer_config.json'}: does not declare the audio tokens"
        )
    return files


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
