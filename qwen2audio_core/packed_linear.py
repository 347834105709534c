"""A faster way to run linear layers on a CPU, and linear layers that lie side by side.

oneDNN multiplies bfloat16 weights in blocks. PyTorch's F.linear puts a weight in that order anew at
every call, which for a few rows takes longer than the product itself. `PackedLinear` keeps the
weight in that order, and a product takes about two thirds of the time. The result is the same to
the bit, but for long sums in many rows with AMX: they are made in another order, no less exact. On
ARM it is closer to the exact one, by up to 3.6 times, and how much faster was not measured.
"""

import math
import os
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = 128  # kept; the steps of 16 conversations, each of 1 to 16 rows, have 80

# Rows that a weight is packed for. It takes any number of them, in the order that suits these: for
# 1 and for 128 that is the same with AVX-512, but with AMX an order made for 1 row is put anew at
# every call of 64 rows or more (a prompt), and one made for 128 is as fast at 1.
ROWS = 128


def limit_shapes(most: int = SHAPES) -> None:
    """Let oneDNN keep its code for so many shapes, where the environment does not say. Call it
    before the first product of the process: later it changes nothing.

    Every number of rows is a shape of its own for every size of layer, and in bfloat16 each that
    has been met holds 0.7 MB (measured, with AVX-512). oneDNN keeps 1,024 of them and PyTorch as
    many descriptions in each thread: prompts of all lengths fill that slowly, like a leak. To make
    one again takes less than half a millisecond.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(most))


class PackedLinear:
    """Fills the slot of one layer; packs its weight at the first call.

    The packed copy takes as much memory as the weight. A weight mapped from a file is not read
    again, and the system may drop its pages. A weight that changes is packed anew, if PyTorch
    counts the change: not one through `weight.data`, nor one of a tensor made in inference mode.
    After such a change fill the slots again: backends.use(model). Where a gradient is wanted, or
    the weight has become one that is not packed, F.linear runs.
    """

    def __init__(self) -> None:
        self._held: _Packed | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x weight^T + bias; x (..., K), weight (N, K), bias (N,), returns (..., N)."""
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return F.linear(x, weight, bias)
        held = self._held  # read once: another thread may be packing too
        if held is None or not held.is_of(weight):
            held = self._held = _Packed(weight)
        if held.packed is None:
            return F.linear(x, weight, bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, held.packed, bias, "none", [], "")
        return y

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PackedLinear, ()  # a packed tensor cannot be copied; the twin packs for itself


class _Packed:
    """A weight in oneDNN's order, or None in its place, and what the weight was then."""

    def __init__(self, weight: Tensor):
        self.packed: Tensor | None = None
        if not why_not_packed(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self._source = weakref.ref(weight)
        self._state = weight.data_ptr(), version(weight)

    def is_of(self, weight: Tensor) -> bool:
        return self._source() is weight and self._state == (weight.data_ptr(), version(weight))


def version(weight: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode keep no such count."""
    return 0 if weight.is_inference() else weight._version


def why_not_packed(weight: Tensor) -> str:
    """Why layers with such a weight cannot or should not be packed; "" if they should."""
    if weight.device.type != "cpu":
        return f"the weights are on {weight.device}"
    if weight.dtype != torch.bfloat16:
        return f"packing gains nothing in {str(weight.dtype).removeprefix('torch.')}"
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not known or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN does not multiply bfloat16 here"
    return ""


def side_by_side(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """One contiguous tensor over all of them, along an axis, if they follow one another in memory.

    They may be anything but for that axis: what lies so without being of one shape is not joined.
    """
    first = tensors[0]
    end, total = first.storage_offset(), sum(tensor.shape[dim] for tensor in tensors)
    shape = [total if axis == dim else size for axis, size in enumerate(first.shape)]
    for tensor in tensors:
        joint = (
            tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and tensor.storage_offset() == end
            and tensor.dtype == first.dtype
            and tensor.stride() == first.stride()
            and tensor.shape[:dim] == first.shape[:dim]
            and tensor.shape[dim + 1 :] == first.shape[dim + 1 :]
        )
        if not joint:
            return None
        end += tensor.shape[dim] * tensor.stride(dim)
    if first.stride(0) != math.prod(shape[1:]):  # else they overlap, or leave gaps
        return None
    return first.detach().as_strided(shape, first.stride())


def joint_bias(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
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
