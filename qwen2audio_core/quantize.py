"""Weight-only quantisation: the linear layers of the language model in 8 or 4 bits a weight.

Decoding reads every weight once a token and does little else, so half the bytes is nearly twice the
speed. Activations, norms, embeddings, the audio tower and the projector stay as they are.

    int8  w ~ code * scale               one scale an output, code in -127 ... 127
    int4  w ~ (code - 8) * scale + zero  one scale and zero for `group` inputs, code in 0 ... 15

No weight moves by more than half a step (one scale). Scales and zeros are bfloat16 whatever the
model's dtype is, so the weights that the codes stand for are the same everywhere. As stored, and as
state_dict() shows them, N outputs and K inputs are

    .qweight  int8  (N, K)
              uint8 (ceil(N/64), K, 32)    byte [b, k, j] holds the code of output 64 b + j, input k
                                           in its low four bits, of output 64 b + 32 + j in its high
    .scales   bfloat16 (N,) or (K/group, 64 ceil(N/64), 2), the scale and the zero

which is what PyTorch's kernel reads on a CPU with AVX-512: a folder of codes is mapped into memory
and used as it is, until an engine lays codes side by side (packing.pack_codes). Other CPUs and GPUs
have the int4 codes rearranged once, when they arrive there.

A few rows go through a kernel that reads the codes: Triton's on a GPU, PyTorch's on a CPU. Of
PyTorch's only the one for bfloat16 is fast, so on a CPU a few rows of any x are rounded to bfloat16
and so is their y, which adds a quarter of int8's own error and less than a fortieth of int4's.
`arrange` makes int8 layers ready for a faster way on a CPU that multiplies bytes, as the engine
does: there x becomes two bytes a number, which is nearer to it, and many rows of bfloat16 and
float16 go that way too; see `QuantizedLinear.in_integers`.
Everything else (the many rows of a prompt, float64, gradients) widens the weights a piece at a
time, each rounded once to the dtype of x, and multiplies as an unquantised layer does.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2audio_core.backends import find_kernels
from qwen2audio_core.cache import KVCache
from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.linear import in_rows
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.ops import on_mps
from qwen2audio_core.packed_linear import joint_bias, side_by_side

METHOD = "qwen2audio"  # what config.json calls this layout
GROUPS = (128, 64, 32)  # sizes of group, the first one that divides a layer's inputs is taken
BLOCK = 64  # outputs that are stored side by side in int4
ROWS = 1  # stands for Triton's form of the int4 codes, where outputs lie apart
FEW = 128  # rows up to which reading codes beats widening them
LARGEST = 127 * 257  # what the largest number of a row becomes, where x is cut into bytes
PIECE = 2**20  # weights widened at a time; on a GPU 64 times as many
_ordering = threading.RLock()  # held while codes are put in order: one thread at a time


@dataclass(frozen=True)
class Scheme:
    """How a model is quantised."""

    bits: int
    group: int = 128  # of int4; a layer with other widths takes the next smaller that fits

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise InputError(f"{self.bits!r:.40} bits a weight are not supported, choose 8 or 4")
        if type(self.group) is not int or self.group not in GROUPS:
            known = ", ".join(map(str, GROUPS))
            raise InputError(
                f"a group of {self.group!r:.40} weights is not supported, choose {known}"
            )

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: str) -> "Scheme | None":
        """From the content of a config.json; None where the weights are not quantised."""
        raw = config.get("quantization_config")
        if raw is None:
            return None
        method = raw.get("quant_method") if isinstance(raw, dict) else raw
        if method != METHOD:
            raise CheckpointError(
                f"{where}: quantised with {method!r:.40}, only {METHOD!r} can be read; start from"
                " the unquantised checkpoint"
            )
        try:
            return cls(raw.get("bits"), raw.get("group_size", 128))
        except InputError as error:
            raise CheckpointError(f"{where}: quantization_config: {error}") from error

    def __str__(self) -> str:
        return "int8" if self.bits == 8 else f"int4 in groups of {self.group}"

    def to_json(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "bits": self.bits, "group_size": self.group}

    def layout(
        self, outputs: int, inputs: int
    ) -> tuple[tuple[tuple[int, ...], torch.dtype], tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of .qweight and of .scales as stored."""
        if self.bits == 8:
            return ((outputs, inputs), torch.int8), ((outputs,), torch.bfloat16)
        blocks = math.ceil(outputs / BLOCK)
        group = fitting(inputs, self.group)
        return (
            ((blocks, inputs, BLOCK // 2), torch.uint8),
            ((inputs // group, blocks * BLOCK, 2), torch.bfloat16),
        )


SCHEMES = {"int8": Scheme(8), "int4": Scheme(4)}


def fitting(inputs: int, group: int) -> int:
    """The largest size of group, up to `group`, that divides a layer's inputs."""
    for size in GROUPS:
        if size <= group and inputs % size == 0:
            return size
    raise InputError(
        f"{inputs} inputs do not divide into groups of {GROUPS[-1]}; use int8 for this layer"
    )


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is codes; takes the place of nn.Linear. y = x w^T + bias

    qweight, scales  as stored, see the top of this file, or on the meta device to be filled
    bias             (N,) or None, in the model's dtype
    outputs          N, which int4 rounds up to whole blocks
    form             of int4 codes that are not as stored; see `settle`
    shared           where oneDNN holds the codes of several layers as one (`join`): a layer without
                     bias over all of them, whose qweight this one's is too, and the rows of it
    """

    qweight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        qweight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        outputs: int,
        form: int = BLOCK,
    ):
        super().__init__()
        self.bits = 8 if qweight.dtype == torch.int8 else 4
        self.in_features, self.out_features = qweight.shape[1], outputs
        if form == ROWS:
            self.in_features *= 2
        self.group = self.in_features if self.bits == 8 else self.in_features // len(scales)
        self.form = form  # of the int4 codes: outputs in a block, or ROWS
        self.shared: tuple[QuantizedLinear, slice] | None = None
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.settle()

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None = None, bits: int = 8, group: int = 128
    ) -> "QuantizedLinear":
        """Quantise a weight (N, K) of any float dtype, on its own device.

        errors  InputError for bits, a group or a K that is not supported, and for a weight that is
                not finite
        """
        rows = weight.detach()
        return cls.from_rows(
            lambda start, stop: rows[start:stop],
            weight.shape,
            Scheme(bits, group),
            weight.device,
            None if bias is None else bias.detach(),
        )

    @classmethod
    def from_rows(
        cls,
        rows_of: Callable[[int, int], Tensor],
        size: Sequence[int],
        scheme: Scheme,
        device: torch.device,
        bias: Tensor | None = None,
    ) -> "QuantizedLinear":
        """The same of a weight that is never there as a whole.

        rows_of  (start, stop) -> those rows of it, (stop - start, K); each is asked for once
        size     (N, K)
        """
        outputs, inputs = size
        (shape, dtype), (scales_shape, scales_dtype) = scheme.layout(outputs, inputs)
        qweight = torch.zeros(shape, dtype=dtype, device=device)
        scales = torch.zeros(scales_shape, dtype=scales_dtype, device=device)
        for start, stop in _pieces(outputs, inputs, device):
            rows = rows_of(start, stop).to(device).float()
            if scheme.bits == 8:
                qweight[start:stop], scales[start:stop] = _codes8(rows)
            else:
                codes, pairs = _codes4(rows, fitting(inputs, scheme.group))
                blocks = slice(start // BLOCK, math.ceil(stop / BLOCK))
                codes = F.pad(codes, (0, 0, 0, -len(codes) % BLOCK))
                qweight[blocks], scales[:, start:stop] = _pack(codes, BLOCK), pairs
        return cls(qweight, scales, bias, outputs)

    @classmethod
    def joined(cls, parts: Sequence["QuantizedLinear"]) -> "QuantizedLinear":
        """One layer with the outputs of several, which have the same inputs and bits. Exact."""
        first, outputs = parts[0], sum(part.out_features for part in parts)
        pieces = [part.stored() for part in parts]
        if first.bits == 8:
            qweight, scales = (torch.cat(list(both)) for both in zip(*pieces, strict=True))
        else:
            rows = [
                (_unpack(qweight, BLOCK)[: part.out_features], scales[:, : part.out_features])
                for part, (qweight, scales) in zip(parts, pieces, strict=True)
            ]
            rest = -outputs % BLOCK
            codes = F.pad(torch.cat([codes for codes, _ in rows]), (0, 0, 0, rest))
            qweight = _pack(codes, BLOCK)
            scales = F.pad(torch.cat([scales for _, scales in rows], 1), (0, 0, 0, rest))
        some = next((part.bias for part in parts if part.bias is not None), None)
        bias = None
        if some is not None:
            zeros = (some.new_zeros(part.out_features) for part in parts)
            pairs = zip(zeros, parts, strict=True)
            bias = torch.cat([z if part.bias is None else part.bias for z, part in pairs])
        return cls(qweight, scales, bias, outputs)

    def forward(self, x: Tensor, deterministic: bool = False) -> Tensor:
        """y = x w^T + bias. With `deterministic` a row's result is bit for bit the same alone and
        among others."""
        if self._reads_codes(x, deterministic):
            if self.for_kernel and (self.form == ROWS or _triton(x.device)):
                return self._on_triton(x, deterministic)
            if x.device.type == "cpu" and (self.bits == 8 or self.form == _cpu_block()):
                return self._on_cpu(x)
        pieces, codes = _pieces(self.out_features, self.in_features, x.device), self.codes
        weights = (self._widened(codes, x.dtype, *piece) for piece in pieces)
        if on_mps(x):  # it ends the process for a weight that lies transposed (pytorch #197796)
            weights = (weight.contiguous() for weight in weights)
        y = torch.cat([in_rows(F.linear, x, weight) for weight in weights], -1)
        return y if self.bias is None else y + self.bias

    @property
    def codes(self) -> Tensor:
        """qweight in its own order of numbers, even where oneDNN holds it in another."""
        codes = self.qweight  # once: an engine may be putting them in order, in another thread
        if not codes.is_mkldnn:
            return codes
        codes = codes.to_dense().T
        return codes if self.shared is None else codes[self.shared[1]]

    @property
    def for_kernel(self) -> bool:
        """Whether the codes lie as qwen2audio_kernels.linear reads them."""
        return self.bits == 8 or self.form == ROWS

    def _on_cpu(self, x: Tensor) -> Tensor:
        codes, scales = self.qweight, self.scales  # the codes once, as above
        if codes.is_mkldnn:
            whole, rows = self.shared or (self, slice(None))
            y = whole.in_integers(x)[..., rows]
        else:
            few = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
            if self.bits == 8:
                y = torch.ops.aten._weight_int8pack_mm(few, codes, scales)
            else:
                codes = codes.view(-1, self.in_features // 2)
                scales = scales.contiguous()  # of layers side by side they lie apart
                y = torch.ops.aten._weight_int4pack_mm_for_cpu(few, codes, self.group, scales)
                y = y[:, : self.out_features]
            y = y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def takes_bytes(self, x: Tensor, deterministic: bool = False) -> bool:
        """Whether `forward` of this x is `in_integers` and the bias."""
        return self.qweight.is_mkldnn and self._reads_codes(x, deterministic)

    def _reads_codes(self, x: Tensor, deterministic: bool) -> bool:
        few = deterministic or x.numel() <= FEW * self.in_features
        few = few or (self.qweight.is_mkldnn and x.dtype != torch.float32)
        gradient = torch.is_grad_enabled() and x.requires_grad
        return few and not gradient and x.dtype != torch.float64

    def in_integers(self, x: Tensor) -> Tensor:
        """x w^T in products of bytes that the CPU adds up in 32 bits. For codes in oneDNN's order.

        A row of x is unit * (256 high + low), two rows of bytes: 16 bits a number, more than
        bfloat16's 8. oneDNN takes the bytes of x unsigned, so 128 is added and taken off again.
        Twice the rows cost nothing while reading the codes takes the time. A row's result is the
        same alone and among others, but for layers of fewer than 192 outputs with codes so
        one-sided that a sum passes 2^24: some of oneDNN's kernels for those round it to float32.
        """
        rows = x.reshape(-1, self.in_features).contiguous()
        unit = rows.abs().amax(-1, keepdim=True).float().clamp_min_(1e-30).mul_(1 / LARGEST)
        # From 257 to 65535, so that its two lower bytes are high + 128 and low + 128.
        numbers = torch.addcdiv(_offset(), rows, unit).to(torch.int32)
        both = numbers.view(torch.uint8).unflatten(-1, (-1, 4))[..., :2]  # (rows, K, 2)
        both = both.permute(2, 0, 1).contiguous()
        scales = self.scales.float()
        most = max(16, 8 * PIECE // self.out_features)  # of which y has two rows in float32 each
        pieces = []
        for part, size in zip(both.split(most, 1), unit.split(most), strict=True):
            low, high = _multiply_bytes(part.flatten(0, 1), self.qweight, scales).chunk(2)
            pieces.append(low.add_(high, alpha=256).mul_(size).to(x.dtype))
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _on_triton(self, x: Tensor, deterministic: bool) -> Tensor:
        y: Tensor = _kernels().linear(
            x, self.codes, self.bias, self.scales, deterministic=deterministic
        )
        return y

    def widened(
        self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """The weights that the codes stand for, (N, K) or the rows [start, stop) of it.

        `start` is a multiple of 64. Each weight is rounded once, to `dtype`.
        """
        stop = self.out_features if stop is None else stop
        return self._widened(self.codes, dtype, start, stop)

    def _widened(self, qweight: Tensor, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        if self.bits == 8:
            return qweight[start:stop].to(dtype) * self.scales[start:stop, None].to(dtype)
        if self.form == ROWS:
            packed = qweight[start:stop]
        else:
            packed = qweight[start // self.form : math.ceil(stop / self.form)]
        codes = _unpack(packed, self.form)[: stop - start].T.to(dtype)  # (K, rows)
        scale, zero = self.scales[:, None, start:stop].to(dtype).unbind(-1)  # (K/group, 1, rows)
        grouped = (codes - 8).unflatten(0, (-1, self.group))
        return torch.addcmul(zero, grouped, scale.contiguous()).flatten(0, 1).T

    def stored(self) -> tuple[Tensor, Tensor]:
        """qweight and scales as stored, whatever form they have here."""
        if self.bits == 8 or self.form == BLOCK:
            return self.codes.contiguous(), self.scales
        rest = -self.out_features % BLOCK
        codes = F.pad(_unpack(self.qweight, self.form)[: self.out_features], (0, 0, 0, rest))
        return _pack(codes, BLOCK), F.pad(self.scales[:, : self.out_features], (0, 0, 0, rest))

    def arrange(self) -> None:
        """Put int8 codes into the order in which oneDNN multiplies bytes, where this CPU does.

        It takes the place of the old one: what was mapped from a file becomes memory of the
        process. state_dict(), copies and moves to other devices are of the codes as stored.
        """
        short = self.in_features <= 2**16  # sums of 255 * 127 must fit into 31 bits
        with _ordering:
            codes = self.qweight
            here = codes.device.type == "cpu" and not codes.is_mkldnn
            if self.bits == 8 and short and here and _multiplies_bytes():
                self.qweight = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)

    def settle(self) -> None:
        """Bring the codes, as stored, into the form that the kernel of their device reads."""
        if self.bits == 8 or self.form != BLOCK:
            return
        if _triton(self.qweight.device) and self.group == 128:
            self.form = ROWS
            codes = _unpack(self.qweight, BLOCK)[: self.out_features]
            self.scales = self.scales[:, : self.out_features].contiguous()
            self.qweight = _pack(codes, ROWS)
        elif self.qweight.device.type == "cpu" and _cpu_block() == 32:
            self.form = 32
            self.qweight = _pack(_unpack(self.qweight, BLOCK), 32)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        # .to(device) ends in the form of the new device; .to(dtype) concerns the bias alone.
        self.qweight, self.scales = self.stored()
        self.form, self.shared = BLOCK, None
        bits = self.scales.view(torch.int16)
        super()._apply(fn, recurse)
        self.scales = fn(bits).view(torch.bfloat16)
        self.settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "qweight"], destination[prefix + "scales"] = self.stored()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.qweight, self.scales = self.stored()
        self.form, self.shared = BLOCK, None
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.settle()

    def __getstate__(self) -> dict[str, Any]:
        # For pickle and copy.deepcopy, which cannot take what oneDNN has put in its order.
        buffers = self._buffers
        if self.qweight.is_mkldnn:
            buffers = buffers | {"qweight": self.stored()[0]}
        return self.__dict__ | {"_buffers": buffers, "shared": None}

    def extra_repr(self) -> str:
        grouped = f", group={self.group}" if self.bits == 4 else ""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}{grouped}"


def join(layers: Sequence[QuantizedLinear]) -> None:
    """Lay the codes of layers with the same inputs side by side, in place, where they can be.

    Each layer keeps its place as a view; `joint` is one layer over all of them. int4 codes lie in
    blocks of 64 outputs (but for ROWS): layers that end within a block stay as they are.
    Where this CPU multiplies bytes, int8 codes are put in order as one instead: `in_order` is the
    layer over all of them, and one that is called by itself takes the time of all.
    """
    first = layers[0]
    by_rows = first.bits == 8 or first.form == ROWS
    alike = all(
        (part.bits, part.group, part.form, part.in_features)
        == (first.bits, first.group, first.form, first.in_features)
        for part in layers
    )
    whole_blocks = by_rows or not any(part.out_features % BLOCK for part in layers[:-1])
    with _ordering, torch.no_grad():
        if not alike or not whole_blocks or any(part.qweight.is_mkldnn for part in layers):
            return
        whole = joint(layers) or _laid_together(layers)
        whole.arrange()
        if whole.qweight.is_mkldnn:
            whole.bias = None
            for part, rows in zip(layers, _rows_of(layers), strict=True):
                # In this order: a thread that reads both looks at the codes first.
                part.shared = whole, rows
                part.qweight = whole.qweight


def _laid_together(layers: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One layer over several, which become views of it."""
    whole = QuantizedLinear.joined(layers)
    by_rows = whole.bits == 8 or whole.form == ROWS
    for part, rows in zip(layers, _rows_of(layers), strict=True):
        if by_rows:
            part.qweight = whole.qweight[rows]
        else:
            rows = slice(rows.start, rows.stop + -rows.stop % BLOCK)
            part.qweight = whole.qweight[rows.start // whole.form : rows.stop // whole.form]
        part.scales = whole.scales[rows] if whole.bits == 8 else whole.scales[:, rows]
        if part.bias is not None and whole.bias is not None:
            part.bias = whole.bias[rows.start : rows.start + part.out_features]
    return whole


def _rows_of(layers: Sequence[QuantizedLinear]) -> list[slice]:
    """Which outputs of one layer over several are whose."""
    ends = list(accumulate(part.out_features for part in layers))
    return [slice(end - part.out_features, end) for part, end in zip(layers, ends, strict=True)]


def joint(layers: Sequence[QuantizedLinear]) -> QuantizedLinear | None:
    """One layer with the outputs of several whose codes lie side by side; None where they do not.

    It takes no memory of its own.
    """
    first, sizes = layers[0], [part.out_features for part in layers]
    if len(layers) == 1:
        return first
    if any(part.qweight.is_mkldnn or part.bits != first.bits for part in layers):
        return None
    qweight = side_by_side([part.qweight for part in layers])
    scales = side_by_side([part.scales for part in layers], 0 if first.bits == 8 else 1)
    biases = [part.bias for part in layers]
    bias = joint_bias(biases, sizes)
    if qweight is None or scales is None or (bias is None and any(b is not None for b in biases)):
        return None
    return QuantizedLinear(qweight, scales, bias, sum(sizes), first.form)


def in_order(layers: Sequence[QuantizedLinear]) -> QuantizedLinear | None:
    """The layer without bias that `join` made of just these for a CPU that multiplies bytes, while
    they are as it left them: its codes stay what they were when theirs are loaded anew or moved."""
    if layers[0].shared is None:
        return None
    whole, spans = layers[0].shared[0], _rows_of(layers)
    as_left = all(
        part.qweight is whole.qweight and part.shared == (whole, rows)
        for part, rows in zip(layers, spans, strict=True)
    )
    return whole if as_left and spans[-1].stop == whole.out_features else None


def quantize(
    model: nn.Module,
    bits: int = 8,
    group: int = 128,
    modules: str = "language_model.*",
) -> list[str]:
    """Replace linear layers by quantised ones, in place, one after the other.

    Beside the model no more is held than the codes of one layer, and each weight is freed when its
    codes stand. (Of a checkpoint that load_model mapped, the pages are the file's; to read and
    quantise it without ever holding them, load with `quantize=`.)

    bits, group  8, or 4 with one scale and zero for 128, 64 or 32 inputs
    modules      which layers, by dotted path: * is any text
    returns      the paths of the layers that were replaced
    errors       InputError for other bits or groups, a path that names no linear layer, and weights
                 that cannot be quantised
    """
    Scheme(bits, group)
    paths = linear_paths(model, modules)
    if not paths:
        raise InputError(f"modules={modules!r} names no linear layer that is not quantised yet")
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        try:
            new = QuantizedLinear.from_weight(layer.weight, layer.bias, bits, group)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        model.set_submodule(path, new)
    return paths


def arrange(model: nn.Module) -> None:
    """Make int8 layers ready for the faster way on a CPU that multiplies bytes; else do nothing.

    It takes about 5 seconds of one core for a billion weights, and is worth it where many tokens
    are to come: a row is 1.3 times as fast then, 8 rows and a prompt 2 to 5 times.
    """
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.arrange()


def linear_paths(model: nn.Module, modules: str = "language_model.*") -> list[str]:
    """The linear layers, not yet quantised, that a pattern names."""
    return [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and fnmatchcase(path, modules)
    ]


def lay_out(model: nn.Module, paths: Iterable[str], scheme: Scheme) -> None:
    """Put empty quantised layers into a model without storage, to be filled from a checkpoint.

    errors  InputError where a path is no linear layer, or one that the scheme cannot hold
    """
    for path in paths:
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Linear):
            raise InputError(f"{path} is quantised, but no linear layer of the model")
        parts = scheme.layout(layer.out_features, layer.in_features)
        qweight, scales = (torch.empty(*part[:1], dtype=part[1], device="meta") for part in parts)
        bias = None if layer.bias is None else layer.bias.detach()
        model.set_submodule(path, QuantizedLinear(qweight, scales, bias, layer.out_features))


def code_names(model: nn.Module) -> dict[str, torch.dtype]:
    """Names in the state dict of the tensors that quantising made, codes and scales; dtype each."""
    return {
        f"{path}.{part}": getattr(layer, part).dtype
        for path, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for part in ("qweight", "scales")
    }


def stored_bytes(model: nn.Module, itemsize: int) -> int:
    """Size of a model's tensors as stored, `itemsize` bytes a number that is no code or scale.

    The model may be without storage.
    """
    codes = code_names(model)
    sizes = (
        tensor.numel() * (codes[name].itemsize if name in codes else itemsize)
        for name, tensor in model.state_dict().items()
    )
    return sum(sizes)


def scheme_of(model: nn.Module) -> Scheme | None:
    """How a model is quantised; None where it is not.

    errors  InputError where its layers differ in more than what their widths explain
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    if not layers:
        return None
    bits = {layer.bits for layer in layers}
    groups = [layer.group for layer in layers if layer.bits == 4]
    scheme = Scheme(min(bits), max(groups, default=128))
    if len(bits) > 1 or any(
        layer.group != fitting(layer.in_features, scheme.group)
        for layer in layers
        if layer.bits == 4
    ):
        raise InputError("the layers are quantised in several ways, one scheme cannot describe it")
    return scheme


@dataclass(frozen=True)
class Answered:
    """A prompt, the tokens that a model continued it with, and the logits that chose them."""

    prompt: Mapping[str, Tensor]
    ids: Tensor  # (B, n)
    logits: Tensor  # (B, n, V) float32


@dataclass(frozen=True)
class Accuracy:
    """How far a model is from the one whose answers it was given."""

    tokens: int  # compared
    relative_rms: float  # sqrt(mean((ours - theirs)^2) / mean(theirs^2)) over all logits
    largest: float  # max |ours - theirs| of a logit
    agreement: float  # share of positions where both choose the same token
    prefix: float  # mean share of an answer up to its first different token


def answer(
    model: Qwen2Audio, prompts: Sequence[Mapping[str, Tensor]], new_tokens: int = 32
) -> list[Answered]:
    """Continue prompts greedily, whatever the tokens mean, and keep the logits.

    prompts  arguments of the model's forward: ids, and mel, conv_frames, attention_mask
    """
    found = []
    for prompt in prompts:
        logits = _decode(model, prompt, new_tokens)
        found.append(Answered(prompt, logits.argmax(-1), logits))
    return found


def accuracy(model: Qwen2Audio, reference: Sequence[Answered]) -> Accuracy:
    """Compare a model with answers of another, given the other's tokens at every step.

    reference = answer(model, prompts)
    quantize(model, 4)
    print(accuracy(model, reference))
    """
    squares = theirs = largest = 0.0
    same, prefixes = [], []
    for known in reference:
        logits = _decode(model, known.prompt, known.ids.shape[1], known.ids)
        difference = logits - known.logits
        squares += float(difference.square().sum())
        theirs += float(known.logits.square().sum())
        largest = max(largest, float(difference.abs().max()))
        equal = (logits.argmax(-1) == known.ids).float()  # (B, n)
        same += equal.flatten().tolist()
        prefixes += equal.cumprod(-1).mean(-1).tolist()
    return Accuracy(
        len(same),
        math.sqrt(squares / theirs),
        largest,
        sum(same) / len(same),
        sum(prefixes) / len(prefixes),
    )


@torch.inference_mode()
def _decode(
    model: Qwen2Audio, prompt: Mapping[str, Tensor], n: int, ids: Tensor | None = None
) -> Tensor:
    """Logits (B, n, V) float32 of n tokens, given `ids` or the likeliest, one step for each."""
    batch, length = prompt["ids"].shape
    weight = model.language_model.model.embed_tokens.weight
    cache = KVCache(model.config.text, batch, length + n, weight.device, weight.dtype)
    logits = [model(**prompt, cache=cache, last_only=True)]
    for step in range(n - 1):
        token = logits[-1].argmax(-1) if ids is None else ids[:, step : step + 1]
        logits.append(model(token, cache=cache))
    return torch.cat(logits, 1).float()


def _codes8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and scales of float32 rows (R, K)."""
    # Rounding the scale to bfloat16 takes at most 1 in 257 off it, and 127 * 257 / 256 < 127.5, so
    # even the largest weight stays within half a step of its code.
    scales = (
        (_finite(rows.abs().amax(-1)) / 127).bfloat16().clamp(min=torch.finfo(torch.bfloat16).tiny)
    )
    return (rows / scales[:, None].float()).round().clamp(-127, 127).to(torch.int8), scales


def _codes4(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int4 codes (R, K) uint8 and scale with zero (K/group, R, 2) of float32 rows (R, K).

    The 16 levels cover zero - 8.5 scale to zero + 7.5 scale within half a step. The zero is rounded
    first, then the scale is made just large enough, and rounded up.
    """
    grouped = rows.unflatten(-1, (-1, group))  # (R, K/group, group)
    low, high = torch.aminmax(grouped, dim=-1)
    zero = (low + (high - low) * (8.5 / 16)).bfloat16().float()
    scale = _finite(torch.maximum((zero - low) / 8.5, (high - zero) / 7.5))
    # bfloat16 is the upper half of float32: carrying any lower bit into it rounds up.
    scale = (scale.view(torch.int32) + 0xFFFF).bitwise_and(-0x10000).view(torch.float32)
    scale = scale.clamp(min=torch.finfo(torch.bfloat16).tiny)
    codes = ((grouped - zero[..., None]) / scale[..., None]).round().add(8).clamp(0, 15)
    pairs = torch.stack((scale, zero), -1).transpose(0, 1)
    return codes.flatten(1).to(torch.uint8), pairs.bfloat16()


def _finite(scale: Tensor) -> Tensor:
    if not bool(torch.isfinite(scale).all()):
        raise InputError("the weight holds NaN or infinity, which no code stands for")
    return scale


def _pack(codes: Tensor, form: int) -> Tensor:
    """Codes (N, K) uint8 to two a byte. N is a multiple of 64 unless `form` is ROWS.

    form     64 or 32, outputs in a block, or ROWS, what qwen2audio_kernels.linear reads
    returns  (N/form, K, form/2), or (N, K/2) for ROWS
    """
    if form == ROWS:
        low, high = codes.unflatten(1, (-1, 2, 64)).unbind(2)
        return (low | high << 4).flatten(1)
    low, high = codes.unflatten(0, (-1, 2, form // 2)).unbind(1)  # (N/form, form/2, K)
    return (low | high << 4).transpose(1, 2).contiguous()


def _unpack(packed: Tensor, form: int) -> Tensor:
    """The inverse of _pack: codes (N, K)."""
    if form == ROWS:
        pairs = packed.unflatten(1, (-1, 64))
        return torch.stack((pairs & 15, pairs >> 4), 2).flatten(1)
    pairs = packed.transpose(0, 1)  # (K, N/form, form/2)
    return torch.stack((pairs & 15, pairs >> 4), 2).flatten(1).T


@cache
def _multiplies_bytes() -> bool:
    """Whether this CPU has products of bytes for oneDNN, which else does them in a slow loop.

    And whether oneDNN uses them, for ONEDNN_MAX_CPU_ISA may forbid it and sums then overflow: so
    the largest bytes are multiplied, and the sum looked at.
    """
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.cpu._is_vnni_supported():
        return False
    with torch.device("cpu"):
        codes = torch.full((64, 512), 127, dtype=torch.int8)
        x = torch.full((2, 512), 255, dtype=torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        y = _multiply_bytes(x, packed, torch.ones(64, dtype=torch.float32))
    return bool((y == 512 * 127 * 127).all())


def _multiply_bytes(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(x - 128) codes^T * scales; x uint8 (M, K), codes in oneDNN's order, returns float32."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, codes, scales, _zeros(len(scales)), None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


@cache
def _offset() -> Tensor:
    with torch.inference_mode(False):
        # The half is there because what follows cuts off and does not round.
        return torch.tensor(128 * 257 + 0.5, dtype=torch.float32, device="cpu")


@cache
def _zeros(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int32, device="cpu")


@cache
def _cpu_block() -> int:
    """Outputs in a block of the codes that PyTorch's int4 kernel reads on this CPU.

    The layout is private to PyTorch and differs between CPUs, so it is asked for by packing
    something: 64 or 32, or 0 where it is neither and the kernel cannot be used.
    """
    with torch.device("cpu"):
        codes = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(0))
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1).flatten()
        for block in (64, 32):
            if torch.equal(_pack(codes.to(torch.uint8), block).flatten(), theirs):
                return block
    return 0


def _triton(device: torch.device) -> bool:
    return device.type == "cuda" and _kernels() is not None


@cache
def _kernels() -> Any:
    return find_kernels()[0]


def _pieces(outputs: int, inputs: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of outputs, whole blocks, that are widened or quantised at a time."""
    held = PIECE if device.type == "cpu" else 64 * PIECE
    step = max(1, held // (inputs * BLOCK)) * BLOCK
    return ((start, min(start + step, outputs)) for start in range(0, outputs, step))
