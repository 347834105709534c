"""A run's state on disk: weights, optimizer, and how far the run had come.

    out/checkpoint-00000500/    state/         tensors in float32, one file a process
                                progress.json  step, epoch, seconds, ...

A checkpoint is written beside its place and renamed when it is complete, so whatever has the name
is whole, and a run that is killed while it saves goes on from the one before.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from qwen2audio_core.errors import CheckpointError

_OPTIONS = StateDictOptions(ignore_frozen_params=True)


def save(
    out: Path,
    progress: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write out/checkpoint-STEP and remove all but the newest `keep`.

    errors   CheckpointError where the disk is full or the folder cannot be written; the
             checkpoints before are still there
    """
    place = out / f"checkpoint-{progress['step']:08}"
    part = out / f".{place.name}.part"
    weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
    state = {"model": weights, "optimizer": moments, "random": torch.get_rng_state()}
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(part / "state"), no_dist=True)
        (part / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(part, place)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"{place}: cannot write it ({str(error).strip().splitlines()[-1]}); the checkpoints"
            " before it are whole: free space and run the same command to go on"
        ) from error
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def checkpoints(out: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(out.glob("checkpoint-????????"))


def load(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's state into the model and the optimizer; returns its progress."""
    weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
    state: dict[str, Any] = {
        "model": weights,
        "optimizer": moments,
        "random": torch.get_rng_state(),
    }
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(place / "state"), no_dist=True)
        progress: dict[str, Any] = json.loads((place / "progress.json").read_text("utf-8"))
    except (OSError, ValueError, RuntimeError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{place}: does not fit this run ({reason})") from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    torch.set_rng_state(state["random"])
    return progress
