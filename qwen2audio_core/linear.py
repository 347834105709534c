"""The linear and embedding layers of the model: torch.nn's, with a slot for the arithmetic."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from qwen2audio_core.ops import on_mps


def in_rows(
    op: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """op(x, weight, bias) of x (..., K); on a Mac's GPU of x (M, K), where the product of half
    precision in three dimensions is slow, on an M5 wrong (pytorch #189847, #180776)."""
    if x.ndim <= 2 or not on_mps(x):
        return op(x, weight, bias)
    return op(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class Drawn:
    """Mixed into a layer of torch.nn: its weights are drawn, but not on the meta device.

    There the draw means nothing, takes most of the time of making a model without storage, and for
    some layers makes PyTorch import its compiler, one to two seconds more.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # type: ignore[attr-defined]
            super().reset_parameters()  # type: ignore[misc]


class Embedding(Drawn, nn.Embedding):
    """nn.Embedding."""


class Linear(Drawn, nn.Linear):
    """nn.Linear with a slot for its arithmetic."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        self.linear_op = F.linear

    def forward(self, x: Tensor) -> Tensor:
        return in_rows(self.linear_op, x, self.weight, self.bias)
