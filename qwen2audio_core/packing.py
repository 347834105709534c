"""Linear layers that read the same input, side by side in one buffer and so one product.

`pack` moves the weights of q, k and v (decoder and encoder) and of gate and up into one buffer for
each group. The parameters become views of it: names, values and state_dict stay as they were, no
weight is stored twice, and saving or training goes on as before. Moving the model to another device
or dtype afterwards takes the groups apart again; pack it anew. A load that copies (weights.py, onto
a GPU or into another dtype) reads the files into such buffers at once, see `room`.

A `Projection` is how the engine calls such a group, or a layer alone, quantised or not.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2audio_core import quantize
from qwen2audio_core.decoder import MLP, Attention
from qwen2audio_core.encoder import EncoderAttention
from qwen2audio_core.errors import InputError
from qwen2audio_core.linear import Linear, in_rows
from qwen2audio_core.packed_linear import joint_bias, side_by_side
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
        y = in_rows(F.linear, x, self.weight, self.bias)
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


class Coded(Separate):
    """The same over codes: one product as long as they lie as quantize.join put them in order."""

    def __init__(self, layers: Sequence[QuantizedLinear], deterministic: bool):
        super().__init__([Alone(layer, deterministic) for layer in layers])
        self.layers = list(layers)
        self._deterministic = deterministic

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        whole = quantize.in_order(self.layers)
        if whole is None or not whole.takes_bytes(x, self._deterministic):
            return super().split(x)
        parts = zip(whole.in_integers(x).split(self.sizes, dim=-1), self.layers, strict=True)
        return tuple(y if layer.bias is None else y + layer.bias for y, layer in parts)


class Kernel(Projection):
    """The same through the Triton kernel `linear` where the rows are few, as in decoding.

    Many rows go to the projection `plain`: a library's product is faster there.

    weight, bias, scale  what the kernel takes; a scale where the weight is codes
    """

    MOST_ROWS = 64

    def __init__(
        self,
        plain: Projection,
        kernel: Callable[..., Tensor],
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None = None,
        deterministic: bool = False,
    ):
        super().__init__(plain.sizes, weight, bias)
        self._plain = plain
        self._kernel = kernel
        self._options: dict[str, Any] = {"scale": scale, "deterministic": deterministic}

    def _few(self, x: Tensor) -> bool:
        return x.numel() <= self.MOST_ROWS * x.shape[-1]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._few(x):
            return self._plain(x, residual)
        return self._kernel(x, self.weight, self.bias, residual=residual, **self._options)

    def gated(self, x: Tensor, swiglu_op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if not self._few(x):
            return self._plain.gated(x, swiglu_op)
        return self._kernel(x, self.weight, self.bias, swiglu=True, **self._options)


class Alone(Projection):
    """One layer as it runs itself: quantised, or with another function in its slot.

    sizes  None, or those of the layers that a quantised one was joined from
    """

    def __init__(
        self,
        layer: nn.Linear | QuantizedLinear,
        deterministic: bool,
        sizes: Sequence[int] | None = None,
    ):
        super().__init__(sizes or [layer.out_features], None, None)
        self.layer = layer
        coded = isinstance(layer, QuantizedLinear)
        self._options = {"deterministic": deterministic} if coded else {}

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.layer.forward(x, **self._options)  # a weight alone runs no hooks either
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
    coded = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    sizes: list[int] = [layer.out_features for layer in (linear or coded)]
    if not coded and all(vars(layer).get("linear_op", F.linear) is F.linear for layer in linear):
        biases = [layer.bias for layer in linear]
        weight = side_by_side([layer.weight for layer in linear])
        bias = joint_bias(biases, sizes)
        if weight is not None and (bias is not None or all(b is None for b in biases)):
            joint = Projection(sizes, weight, bias)
            if kernel is None:
                return joint
            return Kernel(joint, kernel, weight, bias, deterministic=deterministic)
    if not linear and (whole := quantize.joint(coded)) is not None:
        alone = Alone(whole, deterministic, sizes)
        if kernel is None or not whole.for_kernel:
            return alone
        return Kernel(alone, kernel, whole.codes, whole.bias, whole.scales, deterministic)
    if len(layers) == 1:
        return Alone(linear[0], deterministic)
    if not linear and kernel is None:
        return Coded(coded, deterministic)
    return Separate([projection(one, kernel=kernel, deterministic=deterministic) for one in layers])


def groups(model: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """The linear layers that read one input, in order, each with its path."""
    for path, module in model.named_modules():
        if isinstance(module, (Attention, EncoderAttention)):
            names = ["q_proj", "k_proj", "v_proj"]
        elif isinstance(module, MLP):
            names = ["gate_proj", "up_proj"]
        else:
            continue
        yield [(f"{path}.{name}", getattr(module, name)) for name in names]


def pack_codes(model: nn.Module) -> None:
    """Lay the codes of quantised layers over one input side by side, in place, and nothing else.

    Where this CPU multiplies bytes, int8 codes are put into the order for it (quantize.arrange).
    What was mapped from a file becomes memory of the process.
    """
    with torch.inference_mode(False):
        for group in groups(model):
            coded = [layer for _, layer in group if isinstance(layer, QuantizedLinear)]
            if len(coded) == len(group):
                quantize.join(coded)
        quantize.arrange(model)


def pack(model: nn.Module) -> None:
    """Lay weights that are multiplied with the same input side by side, in place.

    Group by group: at most one exists twice. What was mapped from a file (weights.load_model on a
    CPU) becomes memory of the process, 56 % of the published model's weights (9.4 GB in bfloat16);
    its pages of the file are given up. What lies side by side already stays. See pack_codes for
    quantised layers.
    """
    pack_codes(model)
    with torch.inference_mode(False), torch.no_grad():
        for group in groups(model):
            layers = [layer for _, layer in group]
            plain = [one for one in layers if isinstance(one, nn.Linear)]
            if not all(type(one) in (nn.Linear, Linear) for one in layers):
                continue  # an adapter's weights are its own business
            _join([one.weight for one in plain])
            biases: list[Tensor | None] = [one.bias for one in plain]
            sizes = [one.out_features for one in plain]
            some = next((bias for bias in biases if bias is not None), None)
            if some is not None and joint_bias(biases, sizes) is None:
                # The encoder's keys have no bias: zeros stand in its place.
                zeros = [some.new_zeros(size) for size in sizes]
                _join([z if b is None else b for z, b in zip(zeros, biases, strict=True)])


def room(model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Memory for the weights of a model without storage, the parameters' names with their places.

    The groups lie as `pack` would lay them, all else alone. Codes are left out, see code_names.
    """
    state = model.state_dict(keep_vars=True)
    codes = quantize.code_names(model)
    places: dict[str, Tensor] = {}
    for group in groups(model):
        if not all(isinstance(layer, nn.Linear) for _, layer in group):
            continue
        for part in ("weight", "bias"):
            held = [getattr(layer, part) for _, layer in group]
            if all(one is None for one in held):
                continue
            sizes = [layer.out_features for _, layer in group if isinstance(layer, nn.Linear)]
            shape = next(one for one in held if one is not None).shape[1:]
            buffer = torch.empty(sum(sizes), *shape, dtype=dtype, device=device)
            for (path, _), one, place in zip(group, held, buffer.split(sizes), strict=True):
                if one is None:
                    place.zero_()
                else:
                    places[f"{path}.{part}"] = place
    for name, tensor in state.items():
        if name not in codes and name not in places:
            places[name] = torch.empty(tensor.shape, dtype=dtype, device=device)
    return places


def _join(parameters: Sequence[Tensor]) -> None:
    """Move parameters into one new buffer, one behind the other."""
    if side_by_side(parameters) is not None:
        return
    buffer = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
