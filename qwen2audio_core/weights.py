"""Weights between a folder in the published layout and a model.

Reading maps the files into memory. On a CPU, in the checkpoint's own dtype, the mapped pages are
the parameters: nothing is copied, a load takes no time, and memory fills as the weights are first
used. Pages that are never written stay the file's and can be dropped by the system when memory is
short; training writes to private copies of them, never to the file. The files may be deleted or
replaced by a rename meanwhile (that is how saving.py replaces them), but must not be truncated
in place. For another dtype or device threads read pieces, convert them and put them where they
belong, weights that are multiplied with the same input side by side (packing.py).

A quantised folder has `quantization_config` in config.json and in the index, and for each quantised
layer NAME the tensors NAME.qweight and NAME.scales in the place of NAME.weight. quantize.py says
what they hold. They are read as they are whatever dtype is asked for; all else is as published.
"""

import json
import math
import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen2audio_core import frontend, gpu, packing, quantize, reading
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
from qwen2audio_core.quantize import QuantizedLinear, Scheme
from qwen2audio_core.sampling import Settings

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
CODES = {"I8": torch.int8, "U8": torch.uint8}  # of quantised layers; their scales are BF16
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
    offset: int  # its first byte in the file

    @property
    def kind(self) -> torch.dtype | None:
        """Its dtype; None for one that no tensor of this model has."""
        return DTYPES.get(self.dtype, CODES.get(self.dtype))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * (self.kind.itemsize if self.kind else 1)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of it, in new memory of the CPU."""
        assert self.kind is not None
        rows = slice(start, stop).indices(self.shape[0])
        step = math.prod(self.shape[1:]) * self.kind.itemsize
        shape = (rows[1] - rows[0], *self.shape[1:])
        return reading.read(self.file, self.offset + rows[0] * step, self.kind, shape)


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    scheme: Scheme | None = None,
) -> Qwen2Audio:
    """Read a checkpoint in the published layout, or a quantised one.

    folder   holds config.json and model.safetensors, or an index and the shards it names
    dtype    None for the checkpoint's own; another one converts each tensor as it is read
    scheme   quantise the language model while reading, so that its weights are never there but for
             a piece; a folder that is quantised so already is read as it is
    returns  the model in eval mode, the position table frozen
    errors   CheckpointError, before any weight is read: a file that is missing, broken or outside
             the folder; tensors that are missing, unexpected, misshaped or of several dtypes.
             InputError for a layer that cannot be quantised, or a folder quantised otherwise
    """
    found = open_checkpoint(Path(folder), dtype)
    model, device = found.model, torch.device(device)
    if device.type == "cuda":
        gpu.settle()
    paths: list[str] = []
    if scheme is not None and found.scheme is None:
        paths = quantize.linear_paths(model)
        quantize.lay_out(model, paths, scheme)
    elif scheme not in (None, found.scheme):
        raise InputError(f"{folder}: quantised in {found.scheme} already, not in {scheme}")
    state = _read(found, {f"{path}.weight" for path in paths}, device)
    for path in paths:
        state |= quantised(path, found.stored, scheme or Scheme(8), device)
    assign(model, state)
    return model.eval()


def assign(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the tensors the model's own: load_state_dict(strict, assign) at a sixth of its time.

    state  exactly the names and shapes of the model's state_dict
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, QuantizedLinear):  # which knows how its codes are stored
            own = {key: state[prefix + key] for key in module.state_dict()}
            module.load_state_dict(own, strict=True, assign=True)
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                tensor = state[prefix + key]
                module._parameters[key] = torch.nn.Parameter(tensor, parameter.requires_grad)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers hold exactly the tensors of its config.

    model   without storage
    stored  published name -> where the tensor lies
    scheme  how it is quantised; None where it is not
    dtype   of all that is not codes and scales, in the model to be made
    """

    model: Qwen2Audio
    stored: dict[str, Stored]
    scheme: Scheme | None
    dtype: torch.dtype


def open_checkpoint(folder: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """Read and check everything but the weights; arguments and errors as in load_model."""
    config = Qwen2AudioConfig.from_json(inside(folder, "config.json"))
    check_preprocessor(folder, config)
    stored = read_headers(folder)
    scheme = read_scheme(folder)
    model = _build(folder, config, stored, scheme)
    kinds = _dtypes(folder, stored, quantize.code_names(model))
    return Checkpoint(model, stored, scheme, dtype or _only(folder, kinds))


def read_scheme(folder: Path) -> Scheme | None:
    """How a checkpoint is quantised; None where it is not.

    errors  CheckpointError for a scheme that is not ours, and where config and index disagree
    """
    raw = read_json(folder, "config.json")
    scheme = Scheme.from_json(raw, str(folder / "config.json"))
    if not os.path.lexists(folder / WEIGHTS) and os.path.lexists(folder / INDEX):
        listed = read_json(folder, INDEX).get("metadata")
        named = listed.get("quantization_config") if isinstance(listed, dict) else None
        if named != raw.get("quantization_config"):
            raise CheckpointError(
                f"{folder / INDEX}: quantization_config is not that of config.json; the files are"
                " of different checkpoints"
            )
    return scheme


def refuse_codes(folder: Path, why: str) -> None:
    """InputError for a quantised checkpoint; `why` ends in what to do with "the checkpoint that it
    was made from"."""
    if (scheme := read_scheme(folder)) is not None:
        raise InputError(f"{folder}: in {scheme}, {why} the checkpoint that it was made from")


def read_headers(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint under their published names, from the files' headers alone."""
    files = weight_files(folder)
    found: dict[str, Stored] = {}
    for file in files.values():
        start, header = _header(file)
        for key, about in sorted(header.items()):
            name = published_name(key)
            if name in found:
                other = found[name]
                raise CheckpointError(
                    f"{file}: {key} is the same tensor as {other.key} in {other.file.name}"
                )
            offset = start + about["data_offsets"][0]
            found[name] = Stored(file, key, about["dtype"], tuple(about["shape"]), offset)
    if not found:
        raise CheckpointError(
            f"{folder}: the weight files hold no tensor; fetch the checkpoint again"
        )
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


def _read(found: Checkpoint, left_out: Container[str], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the files: mapped where nothing is to be done with them, else read in pieces."""
    stored = {name: entry for name, entry in found.stored.items() if name not in left_out}
    codes = quantize.code_names(found.model)
    state: dict[str, Tensor] = {}
    for file in {entry.file for entry in stored.values()} if device.type == "cpu" else ():
        mapped = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)
        for name, entry in stored.items():
            if entry.file == file and (name in codes or entry.kind == found.dtype):
                part = mapped[entry.offset : entry.offset + entry.bytes]
                state[name] = torch.empty(0, dtype=entry.kind).set_(part).view(entry.shape)
    left = {name: entry for name, entry in stored.items() if name not in state}
    if not left:
        return state
    folder = next(iter(left.values())).file.parent
    try:
        places = packing.room(found.model, found.dtype, device)
        for name in left.keys() & codes.keys():
            places[name] = torch.empty(left[name].shape, dtype=codes[name], device=device)
        parts = [
            reading.Part(entry.file, entry.offset, entry.kind, places[name])
            for name, entry in left.items()
            if entry.kind is not None
        ]
        reading.fill(parts, device, PIECE_BYTES)
    except (RuntimeError, AssertionError, TypeError) as error:
        # AssertionError: built without that device; TypeError: a Mac's GPU knows no float64.
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder}: cannot put the weights on {device} as {plain(found.dtype)} ({first})"
        ) from error
    return state | {name: places[name] for name in left}


def quantised(
    path: str, stored: Mapping[str, Stored], scheme: Scheme, device: torch.device
) -> dict[str, Tensor]:
    """Codes and scales of one layer as stored, from its weight in the files, read in pieces.

    errors  InputError that names the layer, where it cannot be quantised
    """
    entry = stored[f"{path}.weight"]
    try:
        made = QuantizedLinear.from_rows(entry.read, entry.shape, scheme, device)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    qweight, scales = made.stored()
    return {f"{path}.qweight": qweight, f"{path}.scales": scales}


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and what its header says of each.

    The library reads the file first: what it takes has tensors that lie within the file, one after
    the other, each as long as its dtype and shape say.
    """
    try:
        str(file).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{file}: the safetensors library opens no path that is not UTF-8; rename it"
        ) from error
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({str(error).splitlines()[0]}); fetch it again"
        ) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: cannot read it ({str(error).splitlines()[0]})") from error
    header.pop("__metadata__", None)
    return 8 + length, header


def _dtypes(
    folder: Path, stored: dict[str, Stored], codes: Mapping[str, torch.dtype]
) -> dict[torch.dtype, list[str]]:
    """The dtypes in use but for codes and scales, each with the names of its tensors."""
    kinds: dict[torch.dtype, list[str]] = {}
    for name, entry in stored.items():
        if name in codes:
            if entry.kind != codes[name]:
                raise CheckpointError(
                    f"{folder}: {name} has dtype {entry.dtype}, expected {plain(codes[name])}"
                )
            continue
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{folder}: {name} has dtype {entry.dtype}, only {', '.join(DTYPES)} are supported"
            )
        kinds.setdefault(DTYPES[entry.dtype], []).append(name)
    return kinds


def _only(folder: Path, kinds: dict[torch.dtype, list[str]]) -> torch.dtype:
    """The one dtype of a checkpoint."""
    main, *rest = sorted(kinds, key=lambda kind: -len(kinds[kind]))
    if rest:
        others = "; ".join(f"{plain(kind)}: {few(kinds[kind])}" for kind in rest)
        raise CheckpointError(
            f"{folder}: mixed dtypes, {len(kinds[main])} tensors are {plain(main)} but {others};"
            " name a dtype to convert all of them"
        )
    return main


def _build(
    folder: Path,
    config: Qwen2AudioConfig,
    stored: dict[str, Stored],
    scheme: Scheme | None = None,
) -> Qwen2Audio:
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
    if scheme is not None:
        paths = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
        if not paths:
            raise CheckpointError(f"{where}: names a quantisation, the weights hold no codes")
        try:
            quantize.lay_out(model, paths, scheme)
        except InputError as error:
            raise CheckpointError(f"{folder}: {error}") from error
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
    """The model's shapes alone: every parameter on the meta device."""
    with torch.device("meta"):
        return Qwen2Audio(config)


def few(names: list[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def check_dtype(dtype: Any) -> None:
    """Raise InputError for what is neither a dtype of PyTorch's nor None, such as its name."""
    if not isinstance(dtype, torch.dtype | None):
        raise InputError(f"dtype is {dtype!r:.40}, it must be one of PyTorch's: torch.bfloat16")


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
