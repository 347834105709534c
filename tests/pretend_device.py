"""A device that is not the CPU, for a machine that has no other.

    pretend_device.begin("cuda")
    x = torch.arange(3, device="cuda")
    x + torch.ones(3)                     RuntimeError: on two devices

A tensor on it is a CPU tensor in a wrapper that PyTorch takes for one of the other device. The code
under test meets what it would meet on a GPU: an operation between two devices is an error, NumPy
cannot read, a copy to the CPU shares no memory. All is computed by the CPU, to the same bits.

cuda    what asks for a GPU by name goes the GPU's way; streams, events and pinned memory do
        nothing. Gradients are not to be had: PyTorch's autograd asks the driver for its streams
other   a device that is neither CPU nor GPU, as "mps" is one, with gradients. It has no float64 and
        refuses what PyTorch computes wrongly on a Mac (FAULTS)

It stays for the whole process and reaches deep into PyTorch: begin it in a process of its own.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map

OTHER = "other"  # what PyTorch calls PrivateUse1
CPU = torch.device("cpu")
aten = torch.ops.aten

# Operations that make a tensor of nothing. The others fill what `empty` made.
MAKERS = (
    *("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step"),
    *("linspace", "randperm", "randperm.generator", "eye", "hann_window", "hann_window.periodic"),
)
# Their first argument and their values have to be on one device; an index may be on the CPU.
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)

_here: torch.device = CPU
_kept: list[Any] = []  # the library of makers, which ends with its last name


class There(torch.Tensor):
    """A tensor that says it is on the device; `held` is where its values are."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        new = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_here,
        )
        new.held = held
        return new

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    # What PyTorch does in C++, past all dispatch.

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {_here} device type tensor to numpy")

    __array__ = numpy

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device, **options)

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(_index(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_index(key), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                new: Tensor = self.clone()
            if isinstance(self, torch.nn.Parameter):
                new = torch.nn.Parameter(new, self.requires_grad)
            memo[id(self)] = new
        return memo[id(self)]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held})"


def _index(key: Any) -> Any:
    """Lists in an index as tensors, which PyTorch puts on the device."""
    if isinstance(key, tuple):
        return tuple(_index(part) for part in key)
    return torch.tensor(key, device=_here) if isinstance(key, list) and key else key


def _attention(q: Tensor, k: Tensor, v: Tensor, *words: Any, **named: Any) -> bool:
    causal = named.get("is_causal", len(words) > 2 and words[2])
    return bool(causal) or len(q) > 1


# Operation -> whether one of torch 2.11 to 2.13 gets it wrong on a Mac's GPU.
FAULTS = {
    "scaled_dot_product_attention": _attention,  # pytorch #195910, #181133, #184180
    "multinomial": lambda *words, **named: True,  # #192577
    "linear": lambda x, weight, *bias: x.ndim > 2 or not weight.is_contiguous(),  # #180776, #197796
    "avg_pool1d": lambda x, *words, **named: not x.is_contiguous(),  # #175190
    "avg_pool2d": lambda x, *words, **named: not x.is_contiguous(),
}


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: unwrap, compute on the CPU, wrap."""
    name = func._schema.name.removeprefix("aten::")
    if _here.type == OTHER and name in FAULTS and FAULTS[name](*args, **kwargs):
        raise RuntimeError(f"{name}: of such arguments a Mac's GPU gives what is wrong")
    flat = tree_flatten((args, kwargs))[0]
    there = [x for x in flat if isinstance(x, There)]
    here = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, There)]
    asked = next((x for x in flat if isinstance(x, torch.device)), None)
    goes_there = bool(there) if asked is None else asked.type == _here.type
    packet = func.overloadpacket
    if there and packet is not aten.copy_:
        fixed = args[:1] + args[2:3] if packet in INDEXING else here
        wrong = [x for x in fixed if x.ndim and any(x is one for one in here)]
        if wrong:
            shapes = [tuple(x.shape) for x in wrong]
            raise RuntimeError(f"{func}: on two devices, {_here} and the CPU: {shapes}")

    def unwrap(x: Any) -> Any:
        if isinstance(x, torch.device):
            return CPU
        return x.held if isinstance(x, There) else x

    values, options = tree_map(unwrap, (args, kwargs))
    result = func(*values, **options)
    crosses = asked is not None and (there or here) and goes_there != bool(there)
    known = [(x.held, x) for x in there] + [(x, x) for x in here]

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if crosses:
            x = x.clone()  # never the same memory
        for inside, outside in known:
            if inside is x:  # changed in place
                assert x.shape == outside.shape, f"{func} gave a tensor another shape"
                return outside
        if not goes_there:
            return x
        if _here.type == OTHER and x.dtype == torch.float64:
            raise TypeError(f"{_here} knows no float64")
        # A view is an inference tensor only where what it looks at is one.
        plain = func.is_view and not there[0].is_inference()
        with torch.inference_mode(False) if plain else contextlib.nullcontext():
            return There(x)

    return tree_map(wrap, result)


class _Nothing:
    """A stream, an event, a choice of device: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _Backend(backend_registration._DummyBackendModule):
    """What PyTorch asks the module of a device for."""

    Stream = stream = current_stream = staticmethod(lambda *args: _Nothing())

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu"):
        pass


def begin(kind: str) -> torch.device:
    """Make the device, "cuda" or OTHER; returns it."""
    global _here
    if kind == OTHER:
        backend_registration._setup_privateuseone_for_python_backend(
            rename=OTHER, backend_module=_Backend()
        )
    else:
        _no_driver()
    _here = torch.device(kind, 0)
    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)
    for name in MAKERS:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")

        def make(*args: Any, _op: Any = op, **kwargs: Any) -> Any:
            return run(_op, args, {**kwargs, "device": _here})

        library.impl(name, make, "CUDA" if kind == "cuda" else "PrivateUse1")
    # A module's parameters become new ones: a wrapper does not fit into a plain tensor.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    tensor, empty = torch.tensor, torch.empty

    def make_tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    def make_empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*size, **options)

    torch.tensor, torch.empty, torch.Generator = make_tensor, make_empty, _Generator  # type: ignore[assignment,misc]
    return _here


def _no_driver() -> None:
    """Answer what the CUDA driver is asked."""
    torch._C._ensureCUDADeviceGuardSet()
    cuda = torch.cuda
    nothing = {"_lazy_init", "synchronize", "reset_peak_memory_stats", "empty_cache"}
    answers = {
        **dict.fromkeys(nothing),
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "a pretended GPU",
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "graph_pool_handle": (0, 0),
        "current_stream": _Nothing(),
        "default_stream": _Nothing(),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    for name in ("device", "Stream", "Event", "stream"):
        setattr(cuda, name, _Nothing)
