"""A model to a checkpoint in the published layout, all of it or nothing."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2audio_core import quantize
from qwen2audio_core.config import Qwen2AudioConfig
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.hub import INDEX, PATTERNS, SIDE_FILES, WEIGHTS, inside
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.quantize import Scheme
from qwen2audio_core.weights import (
    CODES,
    DTYPES,
    check_dtype,
    few,
    open_checkpoint,
    plain,
    quantised,
    without_storage,
)

_NAMES = {dtype: name for name, dtype in (DTYPES | CODES).items()}


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

    A quantised model is written with its codes, as weights.py describes; transformers does not
    read that.

    dtype       to write; None for the model's own
    companions  a checkpoint's folder to copy the tokenizer and the small settings from
    errors      CheckpointError, and then nothing is left at `folder` but what was there before
    """
    check_dtype(dtype)
    state = model.state_dict()
    codes = quantize.code_names(model)
    names = {name.rpartition(".")[0] + ".weight" if name in codes else name for name in state}
    if other := sorted(names ^ without_storage(model.config).state_dict().keys()):
        raise CheckpointError(
            f"{folder}: with {other[0]!r} the model is not what its config says, and could not be"
            " loaded again: merge adapters first, or keep it with torch.save(model.state_dict())"
        )
    kinds = {plain(tensor.dtype) for name, tensor in state.items() if name not in codes}
    if dtype is None and len(kinds) != 1:
        raise CheckpointError(
            f"{folder}: the model's tensors are of mixed dtypes ({', '.join(sorted(kinds))});"
            " convert it first, for example model.to(torch.bfloat16)"
        )
    files = {} if companions is None else side_files(Path(companions))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    kind = dtype or next(tensor.dtype for name, tensor in state.items() if name not in codes)

    def tensor_of(name: str) -> Tensor:
        return state[name] if name in codes else state[name].to(kind)

    write(
        folder, model.config, shapes, tensor_of, kind, files, max_shard_bytes, overwrite,
        codes, quantize.scheme_of(model),
    )  # fmt: skip


def save_quantised(
    source: str | Path,
    folder: str | Path,
    scheme: Scheme,
    *,
    max_shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
    on_tensor: Callable[[int, int], object] | None = None,
) -> None:
    """Write a checkpoint anew with its language model quantised, one tensor after the other.

    Never held is more than the codes of one layer, or one tensor that stays as it is.

    source     the unquantised checkpoint's folder; its tokenizer and settings go along
    on_tensor  called before each tensor with the number of those written, and of all
    errors     CheckpointError for either folder; InputError for a layer that cannot be quantised
    """
    source = Path(source)
    found = open_checkpoint(source)
    if found.scheme is not None:
        raise InputError(f"{source}: quantised already, in {found.scheme}")
    model, stored = found.model, found.stored
    quantize.lay_out(model, quantize.linear_paths(model), scheme)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    made: dict[str, Tensor] = {}
    asked = 0

    def tensor_of(name: str) -> Tensor:
        nonlocal asked
        if on_tensor is not None:
            on_tensor(asked, len(shapes))
        asked += 1
        path, _, part = name.rpartition(".")
        if part == "qweight":  # its scales follow
            made.update(quantised(path, stored, scheme, torch.device("cpu")))
        return made.pop(name) if name in made else stored[name].read()

    write(
        folder, model.config, shapes, tensor_of, found.dtype, side_files(source),
        max_shard_bytes, overwrite, quantize.code_names(model), scheme,
    )  # fmt: skip


def side_files(folder: Path) -> dict[str, bytes]:
    """A checkpoint's tokenizer and small settings, name -> content."""
    names = [name for name in SIDE_FILES if os.path.lexists(folder / name)]
    return {name: inside(folder, name).read_bytes() for name in names}


def write(
    folder: str | Path,
    config: Qwen2AudioConfig,
    shapes: Mapping[str, tuple[int, ...]],
    tensor_of: Callable[[str], Tensor],
    dtype: torch.dtype,
    files: Mapping[str, bytes],
    max_shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
    codes: Mapping[str, torch.dtype] | None = None,
    scheme: Scheme | None = None,
) -> None:
    """Write a checkpoint tensor by tensor, all of it or nothing.

    It is written beside its destination and renamed when complete. No more than one tensor is held.

    shapes     published name -> shape, in the order of the shards
    tensor_of  asked once for each name, in that order; returns that tensor in its dtype
    dtype      of every tensor but those in `codes`, which have their own
    files      further files, name -> content
    overwrite  replace an earlier checkpoint at `folder`; anything else is never replaced
    scheme     how it is quantised, for config.json and the index
    """
    folder = Path(os.path.expanduser(folder)).absolute()
    _check_target(folder, overwrite)
    dtypes = dict.fromkeys(shapes, dtype) | dict(codes or {})
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = _split(sizes, max_shard_bytes)
    total = sum(sizes.values())
    quantised_as = {} if scheme is None else {"quantization_config": scheme.to_json()}
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
        written = config.to_json() | {"torch_dtype": plain(dtype)} | quantised_as
        _write_json(part / "config.json", written)
        for file, names in shards.items():
            _write_shard(part / file, {name: shapes[name] for name in names}, tensor_of, dtypes)
        if WEIGHTS not in shards:
            files_of = {name: file for file, names in shards.items() for name in names}
            index = {
                "metadata": {"total_size": total, **quantised_as},
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


def clear(folder: Path) -> None:
    """Remove what `write` left beside `folder` when it was killed, and put back the checkpoint that
    it was about to replace. For whoever alone writes there: another's work in progress goes too."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.(part|old)")
    rests = [path for path in folder.parent.glob(".*") if name.fullmatch(path.name)]
    for rest in sorted(rests, key=lambda path: path.stat().st_mtime, reverse=True):
        if rest.suffix == ".old" and not folder.exists():
            rest.rename(folder)
        else:
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
            f"{folder}: holds a checkpoint already; choose another folder, or replace it with"
            " --overwrite (in Python: overwrite=True)"
        )


def _split(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names; a new shard begins where the next tensor would overfill one."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
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
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """One safetensors file: 8 bytes for the header's length, the header in JSON, then the data.

    safetensors' own writer wants every tensor of the file in memory and refuses views of one
    buffer, which is what packed weights are.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtypes[name].itemsize
        header[name] = {
            "dtype": _NAMES[dtypes[name]],
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
            assert tensor.shape == shape and tensor.dtype == dtypes[name], name
            file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # a full disk may show itself only now


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
