"""Linear layers that read the same input, side by side in one buffer and so one product.

`pack` moves the weights of q, k and v (decoder and encoder) and of gate and up into one buffer for
each group. The parameters become views of it: names, values and state_dict stay as they were, no
weight is stored twice, and saving or training goes on as before. Moving the model to another device
or dtype afterwards takes the groups apart again; pack it anew.

A `Projection` is how the engine calls such a group, or a layer alone, quantised or not.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2audio_core.decoder import DecoderLayer
from qwen2audio_core.encoder import EncoderLayer
from qwen2audio_core.errors import InputError
from qwen2audio_core.linear import Linear
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.quantize import QuantizedLinear


class Projection:
    """Linear layers over one input: y = x W^T + b, their outputs behind one another in y.

    sizes    outputs of each layer, in order
    weight   (N, K) and bias (N,) or None, N the sum of the sizes; None where the layers' weights
             lie apart (`Separate`) or are the layer's own business (`Alone`)
    """

    def __init__(self, sizes: Sequence[int], weight: Tensor | None, bias: Tensor | None):
        self.sizes = list(sizes)
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., K) -> (..., N), plus the residual (..., N) where one is given."""
        assert self.weight is not None
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else residual + y

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (..., K) -> the output of each layer, views of one tensor."""
        return self(x).split(self.sizes, dim=-1)

    def gated(self, x: Tensor, swiglu_op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x (..., K) -> swiglu(gate, up) of two layers of one size, (..., N / 2)."""
        gate, up = self.split(x)
        return swiglu_op(gate, up)


class Separate(Projection):
    """The same over weights that lie apart: one product for each."""

    def __init__(self, parts: Sequence[Projection]):
        super().__init__([size for part in parts for size in part.sizes], None, None)
        self.parts = list(parts)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.cat(self.split(x), dim=-1)
        return y if residual is None else residual + y

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)


class Kernel(Projection):
    """The same through the Triton kernel `linear` where the rows are few, as in decoding.

    Many rows go to the library's product, which is faster there.
    """

    MOST_ROWS = 64

    def __init__(self, plain: Projection, kernel: Callable[..., Tensor], deterministic: bool):
        super().__init__(plain.sizes, plain.weight, plain.bias)
        self._kernel = kernel
        self._options: dict[str, Any] = {"deterministic": deterministic}

    def _few(self, x: Tensor) -> bool:
        return x.numel() <= self.MOST_ROWS * x.shape[-1]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._few(x):
            return super().__call__(x, residual)
        return self._kernel(x, self.weight, self.bias, residual=residual, **self._options)

    def gated(self, x: Tensor, swiglu_op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if not self._few(x):
            return super().gated(x, swiglu_op)
        return self._kernel(x, self.weight, self.bias, swiglu=True, **self._options)


class Alone(Projection):
    """One layer as it runs itself: quantised, or with another function in its slot."""

    def __init__(self, layer: nn.Linear | QuantizedLinear, deterministic: bool):
        super().__init__([layer.out_features], None, None)
        if isinstance(layer, QuantizedLinear):
            layer.deterministic = deterministic
        self.layer = layer

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x)
        return y if residual is None else residual + y


def projection(
    *layers: nn.Module,
    kernel: Callable[..., Tensor] | None = None,
    deterministic: bool = False,
) -> Projection:
    """Linear layers over one input as a Projection: one product if their weights lie side by side.

    kernel         qwen2audio_kernels.linear, for layers with nothing else in their slot
    deterministic  for kernels: a row's result is the same bits alone and among others
    errors         InputError for a layer that is more than its weight, such as an adapter
    """
    for layer in layers:
        if type(layer) not in (nn.Linear, Linear, QuantizedLinear):
            raise InputError(
                f"the engine runs plain and quantised linear layers and found a"
                f" {type(layer).__name__}: merge adapters into the weights first"
            )
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    empty_slots = all(vars(layer).get("linear_op", F.linear) is F.linear for layer in linear)
    if len(linear) == len(layers) and empty_slots:
        sizes = [layer.out_features for layer in linear]
        biases = [layer.bias for layer in linear]
        weight = side_by_side([layer.weight for layer in linear])
        bias = _joint_bias(biases, sizes)
        if weight is not None and (bias is not None or all(b is None for b in biases)):
            joint = Projection(sizes, weight, bias)
            return joint if kernel is None else Kernel(joint, kernel, deterministic)
    if len(layers) == 1:
        assert isinstance(layers[0], (nn.Linear, QuantizedLinear))
        return Alone(layers[0], deterministic)
    return Separate([projection(one, kernel=kernel, deterministic=deterministic) for one in layers])


def pack(model: Qwen2Audio) -> None:
    """Lay weights that are multiplied with the same input side by side, in place.

    Layer by layer: at most one group exists twice. What was mapped from a file (weights.load_model
    on a CPU) becomes memory of the process, 56 % of the published model's weights (9.4 GB in
    bfloat16); its pages of the file are given up. What lies side by side already stays, and so do
    quantised layers.
    """
    with torch.inference_mode(False), torch.no_grad():
        for layer in cast(list[DecoderLayer], list(model.language_model.model.layers)):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            if all(type(linear) in (nn.Linear, Linear) for linear in qkv):
                _join([linear.weight for linear in qkv])
                _join([linear.bias for linear in qkv])
            if {type(mlp.gate_proj), type(mlp.up_proj)} <= {nn.Linear, Linear}:
                _join([mlp.gate_proj.weight, mlp.up_proj.weight])
        for encoder in cast(list[EncoderLayer], list(model.audio_tower.layers)):
            heard = encoder.self_attn
            qkv = (heard.q_proj, heard.k_proj, heard.v_proj)
            _join([linear.weight for linear in qkv])
            biases = [linear.bias for linear in qkv]
            if _joint_bias(biases, [linear.out_features for linear in qkv]) is None:
                zeros = torch.zeros_like(biases[0])  # the key projection has no bias
                _join([biases[0], zeros, biases[2]])


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """One tensor over all of them, along the first axis, if they follow one another in memory."""
    first = tensors[0]
    end = first.storage_offset()
    for tensor in tensors:
        joint = (
            tensor.is_contiguous()
            and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and tensor.storage_offset() == end
            and tensor.dtype == first.dtype
            and tensor.shape[1:] == first.shape[1:]
        )
        if not joint:
            return None
        end += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _join(parameters: Sequence[Tensor]) -> None:
    """Move parameters into one new buffer, one behind the other."""
    if side_by_side(parameters) is not None:
        return
    first = parameters[0]
    rows = sum(len(parameter) for parameter in parameters)
    buffer = torch.empty(rows, *first.shape[1:], dtype=first.dtype, device=first.device)
    start = 0
    for parameter in parameters:
        part = buffer[start : start + len(parameter)]
        part.copy_(parameter)
        parameter.data = part
        start += len(parameter)


def _joint_bias(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """The biases as one vector, if they lie so; where a layer has none, zeros must be there."""
    first, last = biases[0], biases[-1]
    if first is None or last is None:
        return None
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for bias, start in zip(biases, starts, strict=True):
        if bias is None:
            continue
        same = bias.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or bias.storage_offset() != first.storage_offset() + start:
            return None
    whole = first.detach().as_strided((sum(sizes),), (1,))
    gaps = [whole[s : s + n] for b, s, n in zip(biases, starts, sizes, strict=True) if b is None]
    return None if any(bool(gap.any()) for gap in gaps) else whole
