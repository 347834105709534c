"""What a CUDA graph does to a step, on any device: its operations are written down and run again.

replay = record(step)       as recording.record_graph(device) does on a GPU
replay()
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.item, torch.ops.aten.is_nonzero)


class Tape(TorchDispatchMode):
    """The operations with their tensors and numbers as they were, and the launches of kernels.

    Replaying runs them on the same memory. A number that Python worked out stays what it was, a
    tensor made anew in place of a static one stays the old one, and asking for a value or taking
    one from another device is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, dict[str, Any], Any]] = []
        self._launching = False

    def __enter__(self) -> "Tape":
        self._tolist, Tensor.tolist = Tensor.tolist, self._waits
        if find_spec("triton"):
            from qwen2audio_kernels import _launch

            self._launch, _launch.launch = _launch.launch, self._launches
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Tensor.tolist = self._tolist
        if find_spec("triton"):
            from qwen2audio_kernels import _launch

            _launch.launch = self._launch
        super().__exit__(*error)

    @staticmethod
    def _waits(tensor: Any) -> None:
        raise AssertionError("waits for the device")

    def _launches(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((self._launch, args, kwargs, None))
        self._launching = True  # the interpreter's own operations belong to the launch
        try:
            self._launch(*args, **kwargs)
        finally:
            self._launching = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._launching:
            return func(*args, **kwargs)
        if func.overloadpacket in WAITING:
            self._waits(args)
        result = func(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs, result))[0] if isinstance(x, Tensor)]
        if len({tensor.device for tensor in tensors if tensor.ndim}) > 1:
            raise AssertionError(f"{func} copies from device to device")
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again, old = tree_flatten(func(*args, **kwargs))[0], tree_flatten(result)[0]
            for new, known in zip(again, old, strict=True):
                if isinstance(known, Tensor) and new.data_ptr() != known.data_ptr():
                    known.copy_(new)


def record(step: Callable[[], Any], warm: bool = True) -> Callable[[], None]:
    if warm:  # as a graph has to be
        step()
    with Tape() as tape:
        step()
    assert len(tape.calls) > 50
    return tape.replay
