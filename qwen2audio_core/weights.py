"""Weights between a folder in the published layout and a model.

Reading maps the files into memory. On a CPU, in the checkpoint's own dtype, the mapped pages are
the parameters: nothing is copied, a load takes no time, and memory fills as the weights are first
used. Pages that are never written stay the file's and can be dropped by the system when memory is
short; training writes to private copies of them, never to the file. The files may be deleted or
replaced by a rename meanwhile (that is how `save_model` replaces them), but must not be truncated
in place. For another dtype or device a piece at a time is read, converted and unmapped.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
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
    PATTERNS,
    SIDE_FILES,
    WEIGHTS,
    find,
    inside,
    read_json,
    weight_files,
    weight_map,
)
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.sampling import Settings

__all__ = ["find", "load_model", "read_settings", "save_model", "write"]

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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

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
                f"{folder / INDEX}: disagrees with the shards about {_few(wrong)};"
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
            f"{entry.file}: cannot put {entry.key} on {device} as {_plain(dtype)} ({first})"
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
        others = "; ".join(f"{_plain(kind)}: {_few(kinds[kind])}" for kind in rest)
        raise CheckpointError(
            f"{folder}: mixed dtypes, {len(kinds[main])} tensors are {_plain(main)} but {others};"
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
        parts = "; ".join(f"{what} {_few(names)}" for what, names in faults.items() if names)
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


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _plain(dtype: torch.dtype) -> str:
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


def save_model(
    model: Qwen2Audio,
    folder: str | Path,
    *,
    companions: str | Path | None = None,
    max_shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a model as a checkpoint with the published names, which transformers reads too.

    companions  a checkpoint's folder to copy the tokenizer and the small settings from
    errors      CheckpointError, and then nothing is left at `folder` but what was there before
    """
    state = model.state_dict()
    kinds = {_plain(tensor.dtype) for tensor in state.values()}
    if len(kinds) != 1:
        raise CheckpointError(
            f"{folder}: the model's tensors are of mixed dtypes ({', '.join(sorted(kinds))});"
            " convert it first, for example model.to(torch.bfloat16)"
        )
    files: dict[str, bytes] = {}
    if companions is not None:
        source = Path(companions)
        for name in SIDE_FILES:
            if os.path.lexists(source / name):
                files[name] = inside(source, name).read_bytes()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    dtype = next(iter(state.values())).dtype
    write(folder, model.config, shapes, state.__getitem__, dtype, files, max_shard_bytes, overwrite)


def write(
    folder: str | Path,
    config: Qwen2AudioConfig,
    shapes: Mapping[str, tuple[int, ...]],
    tensor_of: Callable[[str], Tensor],
    dtype: torch.dtype,
    files: Mapping[str, bytes],
    max_shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint tensor by tensor, all of it or nothing.

    It is written beside its destination and renamed when complete. No more than one tensor is held.

    shapes     published name -> shape, in the order of the shards
    tensor_of  asked once for each name, in that order; returns that tensor in `dtype`
    files      further files, name -> content
    overwrite  replace an earlier checkpoint at `folder`; anything else is never replaced
    """
    folder = Path(folder).expanduser().absolute()
    _check_target(folder, overwrite)
    shards = _split(shapes, dtype.itemsize, max_shard_bytes)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < total:
            raise CheckpointError(
                f"{folder}: the disk has {free / 1e9:.1f} GB free, {total / 1e9:.1f} GB are needed"
            )
        part.mkdir()
        for name, content in files.items():
            (part / name).write_bytes(content)
        _write_json(part / "config.json", config.to_json() | {"torch_dtype": _plain(dtype)})
        for file, names in shards.items():
            _write_shard(part / file, {name: shapes[name] for name in names}, tensor_of, dtype)
        if WEIGHTS not in shards:
            files_of = {name: file for file, names in shards.items() for name in names}
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(files_of.items())),
            }
            _write_json(part / INDEX, index)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot write it ({error.strerror or error}); nothing was left there,"
            " free space or choose another folder"
        ) from error
    finally:  # also after Ctrl-C
        if old.exists() and not folder.exists():
            old.rename(folder)
        for rest in (part, old):
            shutil.rmtree(rest, ignore_errors=True)


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise CheckpointError(f"{folder}: a file is in the way; choose another folder")
        return
    entries = sorted(entry.name for entry in folder.iterdir())
    if not entries:
        return
    foreign = [name for name in entries if not any(fnmatch(name, known) for known in PATTERNS)]
    if foreign or "config.json" not in entries:
        raise CheckpointError(
            f"{folder}: holds other files ({_few(foreign or entries)}); choose a new folder"
        )
    if not overwrite:
        raise CheckpointError(
            f"{folder}: holds a checkpoint already; ask for overwrite or choose another"
        )


def _split(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_shard_bytes: int
) -> dict[str, list[str]]:
    """File name -> tensor names; a new shard begins where the next tensor would overfill one."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {
        f"model-{i:05}-of-{len(groups):05}.safetensors": g for i, g in enumerate(groups, start=1)
    }


def _write_shard(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor_of: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> None:
    """One safetensors file: 8 bytes for the header's length, the header in JSON, then the data.

    safetensors' own writer wants every tensor of the file in memory and refuses views of one
    buffer, which is what packed weights are.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # mapped tensors then start on a cache line
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = tensor_of(name).detach()
            assert tensor.shape == shape and tensor.dtype == dtype, name
            file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # a full disk may show itself only now


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
