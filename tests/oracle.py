"""A tiny model of the reference library, written to files with the published names.

Every parity test goes through real files: the reference is built from a shape and random weights,
`save_official` writes what the hub would hold, and `load_both` reads that folder twice, once with
transformers and once with us.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2audio_core import tiny
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.hub import TOKENIZER_FILES
from qwen2audio_core.weights import load_model, preprocessor_config

OFFICIAL_AUDIO_TOKEN = 151646
OFFICIAL_VOCABULARY = 156032


def tiny_config(
    vocabulary: str = "bytes", audio: dict | None = None, text: dict | None = None
) -> Qwen2AudioConfig:
    """A small shape with every feature of the published one, and grouped-query attention on top.

    vocabulary   "bytes" for the byte-level tokenizer of tiny.py, "official" for the published ids
    audio, text  values that replace those of the shape
    """
    sizes = {"vocab_size": tiny.TINY.text.vocab_size}
    token = tiny.TINY.audio_token_id
    if vocabulary == "official":
        sizes, token = {"vocab_size": OFFICIAL_VOCABULARY}, OFFICIAL_AUDIO_TOKEN
    elif vocabulary != "bytes":
        raise ValueError(f"vocabulary is {vocabulary!r}, expected 'bytes' or 'official'")
    return Qwen2AudioConfig(
        replace(tiny.TINY.audio, **(audio or {})),
        replace(tiny.TINY.text, **sizes | (text or {})),
        token,
    )


def reference_model(config: Qwen2AudioConfig, seed: int = 0, dtype: torch.dtype = torch.float32):
    """The reference library's model of that shape, every parameter random, in eval mode.

    Nothing keeps its usual start value (norms of one, biases of zero): a weight that is left out,
    swapped or transposed then changes the logits far beyond rounding.
    """
    transformers = pytest.importorskip("transformers")
    raw = config.to_json()
    model = transformers.Qwen2AudioForConditionalGeneration(transformers.Qwen2AudioConfig(**raw))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: official(item[0])):
            std = 0.3 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            if "embed" in name:
                std = 0.5
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def official(name: str) -> str:
    """The published name of a parameter of the reference model, whichever release it is of."""
    if name.startswith("language_model."):  # releases before 5: as published
        return name
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return "language_model." + name
    if name.startswith("language_model."):
        return "language_model.model." + name.removeprefix("language_model.")
    return name


def save_official(reference, folder: str | Path, tokenizer_dir: str | Path | None = None) -> Path:
    """Write a reference model as the hub would hold it: one file of weights and all the small ones.

    tokenizer_dir  folder of the published tokenizer; None for the byte-level one of tiny.py
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {official(name): tensor.contiguous() for name, tensor in reference.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    reference.config.save_pretrained(folder)
    config = Qwen2AudioConfig.from_json(folder / "config.json")
    if tokenizer_dir is None:
        for name, content in tiny.byte_tokenizer().items():
            (folder / name).write_bytes(content)
    else:
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_dir) / name).exists():
                shutil.copyfile(Path(tokenizer_dir) / name, folder / name)
    first = config.audio_token_id - tiny.SPECIAL_TOKENS.index("<|AUDIO|>")  # id of <|endoftext|>
    settings = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.5,
        "repetition_penalty": 1.1,
        "eos_token_id": [first, first + 2],
        "pad_token_id": first,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(config)))
    return folder


def load_both(folder: str | Path, dtype: torch.dtype | None = None):
    """(ours, reference), both read from the same files, in eval mode."""
    transformers = pytest.importorskip("transformers")
    reference, report = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        folder, dtype=dtype or "auto", attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        report
    )
    return load_model(folder, dtype=dtype), reference.eval()
