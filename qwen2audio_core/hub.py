"""Which folder a checkpoint lies in, and which files of it may be read."""

import errno
import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qwen2audio_core.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of a folder that training made with LoRA
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
# Small files that travel with the weights. Each may be absent but config.json.
SIDE_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
PATTERNS = ("config.json", *SIDE_FILES, INDEX, "model*.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    offline: bool | None = None,
    weights: bool = True,
) -> Path:
    """Locate a checkpoint, downloading what it needs the first time.

    model      a folder, or the id of a repository on the Hugging Face hub (owner/name)
    revision   branch, tag or commit of the repository
    cache_dir  where downloads are kept; None for the hub's own place (HF_HOME, HF_HUB_CACHE)
    token      for gated repositories; None for the one that `hf auth login` stored
    offline    True never uses the network; None does as HF_HUB_OFFLINE says
    weights    False fetches the small files alone, to look at a checkpoint before downloading it
    returns    the folder; with `weights`, every file that its index names is there
    errors     CheckpointError; after a failed download the next call fetches only what is missing
    """
    text = os.fspath(model)
    if not text:
        raise CheckpointError("the model's name is empty: give a folder or a hub id")
    folder = Path(os.path.expanduser(text))
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise CheckpointError(f"{text}: this is a file; give the folder that holds config.json")
        if not is_id(model):
            raise CheckpointError(
                f"{text}: no such folder, and not a hub id such as Qwen/Qwen2-Audio-7B-Instruct"
            )
        patterns = PATTERNS if weights else ("config.json", *SIDE_FILES, INDEX)
        folder = _download(text, revision, cache_dir, token, offline, patterns)
    elif not (folder / "config.json").exists():
        adapter = next((f for f in (folder, folder / "adapter") if (f / ADAPTER).exists()), None)
        if adapter:
            raise CheckpointError(
                f"{text}: an adapter, not a model: first qwen2audio merge {adapter} --out FOLDER"
            )
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{text}: this folder holds no checkpoint (no config.json)")
    inside(folder, "config.json")
    if weights:
        weight_files(folder)
    return folder


def is_id(model: str | Path) -> bool:
    """Whether `find` looks for it on the hub, and not on this machine."""
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        return False
    return not os.path.exists(os.path.expanduser(model))


def complete(folder: Path) -> bool:
    """Whether all files of weights are there."""
    try:
        return bool(weight_files(folder))
    except CheckpointError:
        return False


def inside(folder: Path, name: str) -> Path:
    """Path of a checkpoint's file, refused unless it is a plain file of that folder.

    A link may lead elsewhere in the folder and, in a snapshot of the hub's cache, into the
    `blobs` folder of the same repository, where the cache keeps all contents.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or Path(name).drive:
        raise CheckpointError(
            f"{folder}: the file name {name!r} leaves the folder; only plain names are read"
        )
    path, home = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        hint = "the download is not complete" if path.is_symlink() else "the folder is not complete"
        raise CheckpointError(f"{path}: no such file; {hint}, fetch the checkpoint again") from None
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in allowed):
        raise CheckpointError(
            f"{path}: a link that leaves the folder (to {real}); put the file itself there"
        )
    if not real.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    return path


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors files of a checkpoint by name, checked to exist and not yet read."""
    if os.path.lexists(folder / WEIGHTS):
        return {WEIGHTS: inside(folder, WEIGHTS)}
    if os.path.lexists(folder / INDEX):
        names = sorted(set(weight_map(folder).values()))
        return {name: inside(folder, name) for name in names}
    others = sorted(entry.name for entry in folder.iterdir())
    if any(fnmatch(name, "model-*.safetensors") for name in others):
        raise CheckpointError(f"{folder}: {INDEX} is missing; fetch the checkpoint again")
    pickles = [name for name in others if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise CheckpointError(
            f"{folder}: no safetensors, only {pickles[0]}; such files can run code when read and"
            " are never opened here, convert them to safetensors first"
        )
    raise CheckpointError(f"{folder}: no {WEIGHTS} and no {INDEX}; this folder holds no checkpoint")


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as model.safetensors.index.json says."""
    names = read_json(folder, INDEX).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(v, str) for v in names.values())
    ):
        raise CheckpointError(f"{folder / INDEX}: weight_map must name the file of every tensor")
    return names


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in one of the checkpoint's JSON files."""
    path = inside(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def _download(
    model: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    offline: bool | None,
    patterns: tuple[str, ...],
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=bool(offline),
                allow_patterns=list(patterns),
            )
        )
    # The hub's library lets its HTTP client's own exceptions through, and which client that is
    # changes between releases. Whatever it was, the person gets one line.
    except Exception as error:
        raise CheckpointError(f"{model}: {_reason(error, offline)}") from error


def _reason(error: Exception, offline: bool | None) -> str:
    """What went wrong with a download and what to do, in one line."""
    from huggingface_hub import constants, errors

    chain = list(_causes(error))
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return "access is restricted; ask for it on the model's page, then run `hf auth login`"
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return "the hub has no such revision of it; check the branch, tag or commit"
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return (
            "the hub knows no such model; check the spelling, or `hf auth login` if it is private"
        )
    if any(isinstance(e, errors.HFValidationError) for e in chain):
        return "not a valid hub id; expected owner/name, such as Qwen/Qwen2-Audio-7B-Instruct"
    for e in chain:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full; free space or set HF_HOME to another disk, then run it again"
        if isinstance(e, OSError) and e.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
        ):
            where = e.filename or constants.HF_HUB_CACHE
            return f"the download folder {where} cannot be written; set HF_HOME to one that can"
    if any(isinstance(e, errors.LocalEntryNotFoundError) for e in chain):
        if offline or constants.HF_HUB_OFFLINE:
            return (
                "offline mode is on and the local cache does not hold all of it; run once with"
                " the network (HF_HUB_OFFLINE=0), or give a local folder"
            )
        return (
            "no such folder here, and the hub cannot be reached for a repository of this name,"
            " which the local cache does not hold; check the name, or the network"
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the download failed ({first}); run it again to resume"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
