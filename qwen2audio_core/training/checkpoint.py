"""A run's state on disk: what is trained, the optimizer, and how far the run had come.

    out/checkpoint-00000500/    state/         tensors, one file a process
                                progress.json  step, epoch, seconds, ...

A checkpoint is written beside its place and renamed when it is complete, so whatever has the name
is whole, and a run that is killed while it saves goes on from the one before. The tensors do not
depend on the number of processes: save on two, go on with one.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from qwen2audio_core.errors import CheckpointError
from qwen2audio_core.training.parallel import Group

_FAILURES = (OSError, RuntimeError, ValueError, KeyError, dcp.api.CheckpointException)


def save(
    out: Path,
    progress: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    group: Group,
) -> Path:
    """Write out/checkpoint-STEP and remove all but the newest `keep`.

    errors   CheckpointError where the disk is full or the folder cannot be written; the
             checkpoints before are still there
    """
    place = out / f"checkpoint-{progress['step']:08}"
    part = out / f".{place.name}.part"
    try:
        if group.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        group.wait()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                _state(model, optimizer),
                storage_writer=dcp.FileSystemWriter(part / "state"),
                no_dist=group.world == 1,
            )
        if group.first:
            (part / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            os.replace(part, place)
            for old in checkpoints(out)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    except _FAILURES as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"{place}: cannot write it ({_reason(error)}); the checkpoints before it are whole:"
            " free space and give the same command to go on"
        ) from error
    group.wait()
    return place


def clear(out: Path) -> None:
    """Remove what a run that was killed while it saved left half written."""
    for part in out.glob(".checkpoint-????????.part"):
        shutil.rmtree(part, ignore_errors=True)


def checkpoints(out: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(out.glob("checkpoint-????????"))


def read_progress(place: Path) -> dict[str, Any]:
    try:
        progress: dict[str, Any] = json.loads((place / "progress.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place}: broken ({error}); remove it to go on without") from error
    return progress


def load(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Put a checkpoint's state into the model and the optimizer."""
    state = _state(model, optimizer)
    try:
        reader = dcp.FileSystemReader(place / "state")
        stored = reader.read_metadata().state_dict_metadata.keys()
        missing = [name for name in state["model"] if f"model.{name}" not in stored]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        mine = {f"model.{name}" for name in state["model"]}
        more = sorted(
            name for name in stored if name.startswith("model.model.") and name not in mine
        )
        if more:  # it would be lost
            name = more[0].removeprefix("model.model.")
            raise ValueError(f"it has trained {name}, and this run leaves that as it was")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # Partial: what has never had a gradient has no moments in the file.
            planner = DefaultLoadPlanner(allow_partial_load=True)
            dcp.load(state, storage_reader=reader, planner=planner, no_dist=group.world == 1)
    except _FAILURES as error:
        raise CheckpointError(
            f"{place}: does not fit this run ({_reason(error)}); begin anew with another --out"
        ) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )
    for name, parameter in model.named_parameters():
        if f"optimizer.state.{name}.step" not in stored:
            optimizer.state.pop(parameter, None)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(
        model, optimizer, options=StateDictOptions(ignore_frozen_params=True)
    )
    return {"model": weights, "optimizer": moments}


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: what the library wraps it in runs over pages."""
    failures = getattr(error, "failures", None)  # of several processes
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    while error.__cause__ is not None:
        error = error.__cause__
    chain: BaseException | None = error
    while chain is not None:  # the writer's own error comes of the disk's, and says nothing of it
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        chain = chain.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
