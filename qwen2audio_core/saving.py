"""A model to a checkpoint in the published layout, all of it or nothing."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.errors import CheckpointError
from qwen2audio_core.hub import INDEX, PATTERNS, SIDE_FILES, WEIGHTS, inside
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.weights import DTYPES, few, plain

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_model(
    model: Qwen2Audio,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    companions: str | Path | None = None,
    max_shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a model as a checkpoint with the published names, which transformers reads too.

    dtype       to write; None for the model's own
    companions  a checkpoint's folder to copy the tokenizer and the small settings from
    errors      CheckpointError, and then nothing is left at `folder` but what was there before
    """
    state = model.state_dict()
    kinds = {plain(tensor.dtype) for tensor in state.values()}
    if dtype is None and len(kinds) != 1:
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
    kind = dtype or next(iter(state.values())).dtype
    write(
        folder,
        model.config,
        shapes,
        lambda name: state[name].to(kind),
        kind,
        files,
        max_shard_bytes,
        overwrite,
    )


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
    folder = Path(os.path.expanduser(folder)).absolute()
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
        _write_json(part / "config.json", config.to_json() | {"torch_dtype": plain(dtype)})
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
            f"{folder}: holds other files ({few(foreign or entries)}); choose a new folder"
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
            "dtype": _NAMES[dtype],
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
