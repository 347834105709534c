"""The linear and embedding layers of the model: torch.nn's, with a slot for the arithmetic."""

import torch.nn.functional as F
from torch import Tensor, nn


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
        return self.linear_op(x, self.weight, self.bias)
