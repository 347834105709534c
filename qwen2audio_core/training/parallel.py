"""Several processes, one model: every tensor is spread over them (FSDP2), batches are dealt out.

Start them with torchrun; alone, everything here is a no-op. Adapters are small: they stay whole on
every process, and their gradients are averaged by hand.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwen2audio_core.errors import InputError
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.training import lora


@dataclass(frozen=True)
class Group:
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: list[float]) -> list[float]:
        """The sum over all processes, number by number."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def from_first(self, value: float) -> float:
        """The first process's number, on all of them."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def start(device: str | None) -> Group:
    """Join the processes that torchrun started, or be alone."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if world > 1 and name == "cuda":
        name = f"cuda:{local}"
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # where PyTorch saves, counts and waits if nothing is named
    if world > 1 and not dist.is_initialized():
        # NCCL's own limit is ten minutes, in which not every disk takes the whole model.
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return Group(rank, world, place)


def spread(trainee: nn.Module, model: Qwen2Audio, group: Group) -> None:
    """Spread a module that holds the model over the processes, layer by layer."""
    if group.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.world,))
    kept = set(lora.parameters(model).values())
    for layer in (*model.audio_tower.layers, *model.language_model.model.layers):
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    fully_shard(trainee, mesh=mesh, ignored_params=kept)


def average_whole(parameters: Iterable[nn.Parameter], group: Group) -> None:
    """Average the gradients of tensors that every process holds whole."""
    if group.world == 1:
        return
    for parameter in parameters:
        if not hasattr(parameter, "to_local"):
            if parameter.grad is None:  # a batch without use for it, beside one that has
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= group.world


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, group: Group) -> float:
    """Scale all gradients so that their norm is at most `limit`; returns the norm before."""
    given = [p for p in parameters if p.grad is not None]
    if group.world == 1:
        return float(nn.utils.clip_grad_norm_(given, limit))
    local: list[Tensor] = []  # each gradient, or this process's piece of it
    spread_out: list[Tensor] = []  # squares of the pieces
    whole: list[Tensor] = []  # and of what every process holds whole
    for parameter in given:
        gradient = parameter.grad
        assert gradient is not None
        piece = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        square = piece.float().square().sum()
        (whole if piece is gradient else spread_out).append(square)
        local.append(piece)
    # Together, as to ask for each would wait for the device at each.
    pieces, wholes = (float(torch.stack(s).sum()) if s else 0.0 for s in (spread_out, whole))
    norm = (group.total([pieces])[0] + wholes) ** 0.5
    if norm > limit:
        for piece in local:
            piece.mul_(limit / (norm + 1e-6))
    return norm


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, in one piece; all of them must ask."""
    full = getattr(tensor, "full_tensor", None)
    result: Tensor = full() if full is not None else tensor
    return result
