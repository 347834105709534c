"""Low-rank adapters: y = W x + (alpha / rank) B A dropout(x), W as it was.

A layer is swapped in place. Its own weight keeps its name and its storage; beside it stand `lora_A`
(rank, inputs) and `lora_B` (outputs, rank). B begins at zero, so an adapted model begins as the
model it adapts. Hu et al., arXiv 2106.09685.

    lora.add(model, Settings(rank=8))       train, then lora.save(model, folder)
    with lora.disabled(model): ...          the model without the adapter
    lora.merge(model)                       W + (alpha / rank) B A, plain layers again
    lora.write_merged(model, folder, base)  the same straight to a checkpoint

An adapter's folder is PEFT's: adapter_config.json and adapter_model.safetensors.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from qwen2audio_core import hub, saving
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.linear import Linear, in_rows
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.weights import few, published_name

CONFIG, WEIGHTS = hub.ADAPTER, "adapter_model.safetensors"
LANGUAGE_MODEL = ("language_model.model.layers.*_proj",)  # all its layers but the head
# Of PEFT's init_lora_weights; pissa, olora, corda, loftq and others change the model's own weights.
_BASE_AS_IT_WAS = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."  # PEFT's wrapper around the model


@dataclass(frozen=True)
class Settings:
    rank: int = 8
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.0  # of the adapter's input, while training
    patterns: tuple[str, ...] = LANGUAGE_MODEL  # module paths, with * and ?

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not self.alpha > 0:
            raise InputError(
                f"LoRA with rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: expected"
                " a rank of at least 1, alpha above 0, dropout of at least 0 and below 1"
            )


class LoRALinear(Linear):
    """A linear layer and its adapter."""

    def __init__(self, layer: nn.Linear, settings: Settings):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.linear_op = getattr(layer, "linear_op", F.linear)
        self.scale = settings.alpha / settings.rank
        self.dropout = settings.dropout
        self.enabled = True
        # In float32 whatever the weight is: the steps of training are finer than bfloat16.
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        like = self.weight.new_empty(0, dtype=wide)
        self.lora_A = nn.Parameter(like.new_empty(settings.rank, self.in_features))
        self.lora_B = nn.Parameter(like.new_zeros(self.out_features, settings.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT begins

    def forward(self, x: Tensor) -> Tensor:
        y = in_rows(self.linear_op, x, self.weight, self.bias)
        if not self.enabled:
            return y
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        kind = self.lora_A.dtype if not torch.is_autocast_enabled(x.device.type) else x.dtype
        low = in_rows(F.linear, in_rows(F.linear, x.to(kind), self.lora_A), self.lora_B)
        return y + (self.scale * low).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with the adapter in it, in the weight's dtype."""
        change = self.scale * (self.lora_B @ self.lora_A)
        return (self.weight.to(change.dtype) + change).to(self.weight.dtype)


def add(model: Qwen2Audio, settings: Settings) -> list[str]:
    """Put adapters into all linear layers whose path matches; everything else stops training.

    returns  the paths
    errors   InputError for a pattern that matches no linear layer
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    if any(isinstance(module, LoRALinear) for module in linear.values()):
        raise InputError("the model has an adapter already: merge it first")
    for pattern in settings.patterns:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise InputError(
                f"no linear layer matches {pattern!r}; their paths are like {few(list(linear))}"
            )
    model.requires_grad_(False)
    chosen = [
        name for name in linear if any(fnmatchcase(name, pattern) for pattern in settings.patterns)
    ]
    for name in chosen:
        _put(model, name, LoRALinear(linear[name], settings))
    return chosen


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer.train(model.training))


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' tensors by name."""
    found = model.named_parameters()
    return {name: p for name, p in found if name.endswith((".lora_A", ".lora_B"))}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model as it was before the adapter."""
    adapted = [layer for layer in layers(model).values() if layer.enabled]
    try:
        for layer in adapted:
            layer.enabled = False
        yield
    finally:
        for layer in adapted:
            layer.enabled = True


def merge(model: Qwen2Audio) -> None:
    """Add the adapters to the weights for good and make the layers plain again."""
    for name, layer in layers(model).items():
        plain = Linear.__new__(Linear)
        nn.Module.__init__(plain)
        plain.in_features, plain.out_features = layer.in_features, layer.out_features
        plain.weight = nn.Parameter(layer.merged(), requires_grad=False)
        plain.bias = layer.bias
        plain.linear_op = layer.linear_op
        _put(model, name, plain)


def write_merged(
    model: Qwen2Audio, folder: str | Path, companions: str | Path, overwrite: bool = False
) -> None:
    """Write the model with its adapters in the weights as a plain checkpoint, layer by layer: the
    model itself stays as it is, and no more than one merged weight is held.

    companions  the base's folder, for its tokenizer and settings
    """
    adapted = {f"{name}.weight": layer for name, layer in layers(model).items()}
    state = {k: v for k, v in model.state_dict().items() if not k.endswith((".lora_A", ".lora_B"))}
    dtype = model.language_model.lm_head.weight.dtype
    saving.write(
        folder,
        model.config,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda name: adapted[name].merged() if name in adapted else state[name],
        dtype,
        saving.side_files(Path(companions)),
        overwrite=overwrite,
    )


# PEFT's files


def save(model: Qwen2Audio, folder: str | Path, base: str = "") -> None:
    """Write the adapter as PEFT does.

    base  what it belongs to, a hub id or a folder, whose whole path is written:
          base_model_name_or_path
    """
    if os.path.isdir(base):
        base = os.path.abspath(base)
    from safetensors.torch import save as to_bytes

    adapted = layers(model)
    if not adapted:
        raise InputError("the model has no adapter to save")
    first = next(iter(adapted.values()))
    rank = first.lora_A.shape[0]
    tensors = {
        f"{_PREFIX}{_their_name(name)}.{part}.weight": tensor.detach().cpu().contiguous()
        for name, layer in adapted.items()
        for part, tensor in (("lora_A", _whole(layer.lora_A)), ("lora_B", _whole(layer.lora_B)))
    }
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(first.scale * rank, 6),
        "lora_dropout": first.dropout,
        "target_modules": _pattern_of(list(adapted)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            (WEIGHTS, to_bytes(tensors, metadata={"format": "pt"})),
            (CONFIG, (json.dumps(config, indent=2) + "\n").encode()),
        ):
            part = folder / f".{name}.part"
            try:
                part.write_bytes(content)
                part.replace(folder / name)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write it ({error.strerror})") from error


def _whole(parameter: Tensor) -> Tensor:
    full = getattr(parameter, "full_tensor", None)  # of one that is spread over processes
    return full() if full is not None else parameter


def _their_name(name: str) -> str:
    """A layer's path in the reference library from release 5 on; earlier ones wrote ours."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def _pattern_of(names: Sequence[str]) -> str:
    """The adapted layers as a regular expression, which PEFT matches against whole paths: each
    tower's name, whatever a release has around it, and the path in the tower."""
    tails: dict[str, list[str]] = {}
    parts: list[str] = []
    for name in names:
        tower, _, rest = name.partition(".")
        if rest == "lm_head":  # which stands outside its tower from release 5 on
            parts.append(rf"(?:{tower}\.)?lm_head")
        else:
            tails.setdefault(tower, []).append(re.escape(rest.removeprefix("model.")))
    parts += (rf"{tower}\.(?:model\.)?(?:{'|'.join(rest)})" for tower, rest in tails.items())
    return rf"(?:.*\.)?(?:{'|'.join(parts)})"


def base_of(folder: str | Path) -> str:
    """What an adapter belongs to, as its config says: a hub id, a folder, or "" if it does not."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not an adapter, {CONFIG} is missing or broken") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return base if isinstance(base, str) else ""


def load(model: Qwen2Audio, folder: str | Path) -> Settings:
    """Put an adapter from PEFT's files into the model, ready to run or to train on.

    errors   CheckpointError for files that are missing, of another kind, or of another shape
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: not an adapter, expected {CONFIG} and {WEIGHTS} ({error.strerror})"
        ) from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: broken ({str(error).splitlines()[0]})") from error
    _check_config(folder, config)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(.+)\.(lora_[AB]|base_layer)(?:\.default)?\.weight", key
        )
        if match is None:
            raise CheckpointError(f"{folder / WEIGHTS}: {key} is not part of a LoRA adapter")
        name = published_name(match[1] + ".weight").removesuffix(".weight")
        found.setdefault(name, {})[match[2]] = tensor
    modules = dict(model.named_modules())
    for name, pair in found.items():
        module = modules.get(name)
        own = pair.pop("base_layer", None)  # PEFT writes that of an adapted head along
        if not isinstance(module, Linear) or pair.keys() != {"lora_A", "lora_B"}:
            raise CheckpointError(f"{folder / WEIGHTS}: {name} does not fit the model")
        if own is not None and not _same(own, module.weight):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} was another weight when the adapter was made: load it"
                " into the model that it belongs to"
            )
        shapes = (config["r"], module.in_features), (module.out_features, config["r"])
        if (tuple(pair["lora_A"].shape), tuple(pair["lora_B"].shape)) != shapes:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} has shapes {tuple(pair['lora_A'].shape)} and"
                f" {tuple(pair['lora_B'].shape)}, expected {shapes[0]} and {shapes[1]}"
            )
    settings = Settings(
        config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), tuple(found)
    )
    add(model, settings)
    with torch.no_grad():
        for name, layer in layers(model).items():
            layer.lora_A.copy_(found[name]["lora_A"])
            layer.lora_B.copy_(found[name]["lora_B"])
    return settings


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are one, but for the rounding of their dtypes."""
    a = a.to(b.device)
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-5)


def _check_config(folder: Path, config: Any) -> None:
    """Refuse what would change the arithmetic."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: not a LoRA adapter")
    for key, good in (
        ("use_dora", (False, None)),
        ("use_rslora", (False, None)),
        ("bias", ("none", None)),
        ("rank_pattern", ({}, None)),
        ("alpha_pattern", ({}, None)),
        ("modules_to_save", ([], None)),
        ("fan_in_fan_out", (False, None)),
        ("alora_invocation_tokens", (None,)),
    ):
        if config.get(key) not in good:
            raise CheckpointError(
                f"{folder / CONFIG}: {key} {config[key]!r} is not supported, only {good[0]!r}"
            )
    begin = config.get("init_lora_weights")
    if begin not in _BASE_AS_IT_WAS:
        raise CheckpointError(
            f"{folder / CONFIG}: init_lora_weights {begin!r} is not supported, such an adapter"
            " belongs to weights that were changed as well: save it as a plain one, in PEFT with"
            " path_initial_model_for_weight_conversion"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{folder / CONFIG}: r and lora_alpha must be numbers")
