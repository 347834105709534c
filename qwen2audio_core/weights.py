"""Weights between a folder in the published layout and a model.

Reading maps the files into memory. On a CPU, in the checkpoint's own dtype, the mapped pages are
the parameters: nothing is copied, a load takes no time, and memory fills as the weights are first
used. Pages that are never written stay the file's and can be dropped by the system when memory is
short; training writes to private copies of them, never to the file. The files may be deleted or
replaced by a rename meanwhile (that is how saving.py replaces them), but must not be truncated
in place. For another dtype or device a piece at a time is read, converted and unmapped.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qwen2audio_core import frontend
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.hub import (
    INDEX,
    WEIGHTS,
    inside,
    read_json,
    weight_files,
    weight_map,
)
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.sampling import Settings

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
PIECE_BYTES = 32_000_000  # of a file, held in memory while it is converted
# What of generation_config.json is read, besides eos_token_id. Lengths are the caller's to choose.
_SETTINGS: dict[str, Any] = {
    "do_sample": bool,
    "temperature": (int, float),
    "top_k": int,
    "top_p": (int, float),
    "repetition_penalty": (int, float),
    "pad_token_id": int,
}

# Releases of the reference library wrote four spellings of the trunk, and the head and the audio
# side with and without a leading `model.`; see `published_name`.
_SPELLINGS = (
    (re.compile(r"(?:model\.)?language_model\.(?:model\.){0,2}(?=(?:embed_tokens|layers|norm)\.)"),
     "language_model.model."),
    (re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?(?=lm_head\.)"), "language_model."),
    (re.compile(r"model\.(?=(?:audio_tower|multi_modal_projector)\.)"), ""),
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what the file's header says of it."""

    file: Path
    key: str  # its name in that file
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * (DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1)


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Qwen2Audio:
    """Read a checkpoint in the published layout.

    folder   holds config.json and model.safetensors, or an index and the shards it names
    dtype    None for the checkpoint's own; another one converts each tensor as it is read
    returns  the model in eval mode, the position table frozen
    errors   CheckpointError, before any weight is read: a file that is missing, broken or outside
             the folder; tensors that are missing, unexpected, misshaped or of several dtypes
    """
    folder = Path(folder)
    config = Qwen2AudioConfig.from_json(inside(folder, "config.json"))
    check_preprocessor(folder, config)
    stored = read_headers(folder)
    kinds = _dtypes(folder, stored)
    dtype = dtype or _only(folder, kinds)
    model = _build(folder, config, stored)
    device = torch.device(device)
    state: dict[str, Tensor] = {}
    if device.type == "cpu" and kinds.keys() == {dtype}:
        for file in {entry.file for entry in stored.values()}:
            with _open(file) as tensors:
                for name, entry in stored.items():
                    if entry.file == file:
                        state[name] = tensors.get_tensor(entry.key)
    else:
        for name, entry in stored.items():
            state[name] = _converted(entry, device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def read_headers(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint under their published names, from the files' headers alone."""
    files = weight_files(folder)
    found: dict[str, Stored] = {}
    for file in files.values():
        with _open(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping, has no iterator)
                header = tensors.get_slice(key)
                name = published_name(key)
                if name in found:
                    other = found[name]
                    raise CheckpointError(
                        f"{file}: {key} is the same tensor as {other.key} in {other.file.name}"
                    )
                found[name] = Stored(file, key, header.get_dtype(), tuple(header.get_shape()))
    if WEIGHTS not in files:
        listed = {published_name(key): name for key, name in weight_map(folder).items()}
        held = {name: entry.file.name for name, entry in found.items()}
        wrong = sorted(name for name in listed | held if listed.get(name) != held.get(name))
        if wrong:
            raise CheckpointError(
                f"{folder / INDEX}: disagrees with the shards about {few(wrong)};"
                " fetch the checkpoint again"
            )
    return found


def published_name(key: str) -> str:
    """The name the published checkpoint gives to a tensor that a later release wrote as `key`.

    model.language_model.norm.weight -> language_model.model.norm.weight
    """
    for pattern, prefix in _SPELLINGS:
        match = pattern.match(key)
        if match:
            return prefix + key[match.end() :]
    return key


def _converted(entry: Stored, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of the files in other storage, piece by piece so that it never exists twice."""
    row = math.prod(entry.shape[1:]) * DTYPES[entry.dtype].itemsize
    rows = max(1, PIECE_BYTES // max(1, row))
    try:
        tensor = torch.empty(entry.shape, dtype=dtype, device=device)
        for start in range(0, entry.shape[0], rows):
            # Opened anew for each piece: pages that were read stay in memory until it is closed.
            with _open(entry.file) as tensors:
                tensor[start : start + rows] = tensors.get_slice(entry.key)[start : start + rows]
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{entry.file}: cannot put {entry.key} on {device} as {plain(dtype)} ({first})"
        ) from error
    return tensor


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({str(error).splitlines()[0]}); fetch it again"
        ) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: cannot read it ({str(error).splitlines()[0]})") from error


def _dtypes(folder: Path, stored: dict[str, Stored]) -> dict[torch.dtype, list[str]]:
    """The dtypes in use, each with the names of its tensors."""
    kinds: dict[torch.dtype, list[str]] = {}
    for name, entry in stored.items():
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{folder}: {name} has dtype {entry.dtype}, only {', '.join(DTYPES)} are supported"
            )
        kinds.setdefault(DTYPES[entry.dtype], []).append(name)
    return kinds


def _only(folder: Path, kinds: dict[torch.dtype, list[str]]) -> torch.dtype:
    """The one dtype of a checkpoint."""
    if not kinds:
        raise CheckpointError(
            f"{folder}: the weight files hold no tensor; fetch the checkpoint again"
        )
    main, *rest = sorted(kinds, key=lambda kind: -len(kinds[kind]))
    if rest:
        others = "; ".join(f"{plain(kind)}: {few(kinds[kind])}" for kind in rest)
        raise CheckpointError(
            f"{folder}: mixed dtypes, {len(kinds[main])} tensors are {plain(main)} but {others};"
            " name a dtype to convert all of them"
        )
    return main


def _build(folder: Path, config: Qwen2AudioConfig, stored: dict[str, Stored]) -> Qwen2Audio:
    """The model without storage, once the files are known to hold exactly its tensors."""
    where = folder / "config.json"
    layers = config.audio.encoder_layers + config.text.num_hidden_layers
    if layers > len(stored):  # the loop that makes the layers must be bounded by the files
        raise CheckpointError(
            f"{where}: declares {layers} layers, the weights are {len(stored)} tensors"
        )
    try:
        model = without_storage(config)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: declares impossible sizes ({error})") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    bent = [
        f"{name} is {_size(stored[name].shape)}, expected {_size(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    faults = {
        "missing": [name for name in expected if name not in stored],
        "unexpected": [entry.key for name, entry in stored.items() if name not in expected],
        "misshaped": bent,
    }
    if any(faults.values()):
        parts = "; ".join(f"{what} {few(names)}" for what, names in faults.items() if names)
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {parts}")
    return model


def without_storage(config: Qwen2AudioConfig) -> Qwen2Audio:
    """The model's shapes alone: every parameter on the meta device, nothing allocated or drawn."""
    with torch.device("meta"), _SkipInit():
        return Qwen2Audio(config)


class _SkipInit(TorchFunctionMode):
    """Leaves new parameters as they are. Even on the meta device, drawing them has a price: it
    makes PyTorch import its compiler, one to two seconds."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def few(names: list[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def plain(dtype: torch.dtype) -> str:
    """A dtype without its module: float32."""
    return str(dtype).removeprefix("torch.")


def read_settings(folder: str | Path) -> Settings:
    """generation_config.json, or greedy decoding without a penalty where there is none."""
    folder = Path(folder)
    name = "generation_config.json"
    raw = read_json(folder, name) if os.path.lexists(folder / name) else {}
    # null is the library's way to say absent; top_k is 50 where the file does not say otherwise.
    raw = {key: value for key, value in raw.items() if value is not None}
    values = {"top_k": 50} | {key: raw[key] for key in raw if key in _SETTINGS}
    ends = raw.get("eos_token_id", list(Settings.eos_token_ids))
    values["eos_token_ids"] = tuple(ends) if isinstance(ends, list) else (ends,)
    if not values["eos_token_ids"]:
        raise CheckpointError(f"{folder / name}: eos_token_id is empty, an answer would never end")
    for key, value in values.items():
        kind = _SETTINGS.get(key, int)
        for part in value if isinstance(value, tuple) else (value,):
            number = isinstance(part, kind) and (kind is bool or not isinstance(part, bool))
            if not number or (kind is int and not 0 <= part < 2**31):
                raise CheckpointError(
                    f"{folder / name}: {key.replace('ids', 'id')} is {part!r}, expected"
                    f" {'true or false' if kind is bool else 'a number'}"
                )
    try:
        return Settings(**values)
    except InputError as error:
        raise CheckpointError(f"{folder / name}: {error}") from error


def preprocessor_config(config: Qwen2AudioConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json: the numbers of frontend.py under published names."""
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "Qwen2AudioProcessor",
        "feature_size": config.audio.num_mel_bins,
        "sampling_rate": frontend.SAMPLE_RATE,
        "n_fft": frontend.N_FFT,
        "hop_length": frontend.HOP_LENGTH,
        "chunk_length": frontend.MAX_SECONDS,
        "n_samples": frontend.MAX_SAMPLES,
        "nb_max_frames": frontend.MAX_FRAMES,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


def check_preprocessor(folder: Path, config: Qwen2AudioConfig) -> None:
    """Refuse a checkpoint that was trained on other log-mels than frontend.py computes."""
    name = "preprocessor_config.json"
    if os.path.lexists(folder / name):
        raw = read_json(folder, name)
    elif os.path.lexists(folder / "processor_config.json"):  # where later releases put it
        name = "processor_config.json"
        raw = read_json(folder, name).get("feature_extractor") or {}
    else:
        return
    for key, expected in (
        preprocessor_config(config) | {"dither": 0.0, "do_normalize": False}
    ).items():
        if (
            key not in ("processor_class", "return_attention_mask")
            and raw.get(key, expected) != expected
        ):
            raise CheckpointError(
                f"{folder / name}: {key} is {raw[key]!r}, only {expected!r} is supported"
            )
