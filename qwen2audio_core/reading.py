"""Bytes of safetensors files into memory that is already there, several parts at a time.

Threads read the files into buffers of their own and copy from there, converting on the way. For a
GPU the buffers are page-locked and each thread has two: while one is on its way to the device, the
other is being filled.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen2audio_core.errors import CheckpointError

THREADS = 4
GPU_BUFFER_BYTES = 128_000_000  # page-locked memory of all threads together


@dataclass(frozen=True)
class Part:
    """A whole tensor of a file, and where it goes.

    offset  its first byte in the file
    dtype   as stored
    target  contiguous, of the same count of elements, on any device and in any dtype
    """

    file: Path
    offset: int
    dtype: torch.dtype
    target: Tensor

    def read(self, buffer: Tensor) -> Tensor:
        return read(self.file, self.offset, self.dtype, self.target.shape, buffer)


def fill(parts: Iterable[Part], device: torch.device, buffer_bytes: int) -> None:
    """Read all parts into their targets, which lie on `device`.

    buffer_bytes  held at most while reading; on a GPU GPU_BUFFER_BYTES
    errors        CheckpointError for a file that cannot be read or ends too early; RuntimeError
                  where the device refuses
    """
    on_gpu = device.type == "cuda"
    threads = THREADS if device.type in ("cpu", "cuda") else 1
    size = GPU_BUFFER_BYTES // 2 if on_gpu else buffer_bytes
    size = max(16, size // threads // 16 * 16)  # so that a buffer begins and ends with an element
    left = _pieces(parts, size)
    lock = threading.Lock()
    inference = torch.is_inference_mode_enabled()  # a thread's own, as is no_grad

    def take() -> Part | None:
        with lock:
            return next(left, None)

    def work() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():
                _feed(take, device, size) if on_gpu else _convert(take, size)
        except BaseException:
            stop()
            raise

    def stop() -> None:
        nonlocal left
        with lock:
            left = iter(())

    with ThreadPoolExecutor(threads, "reading") as pool:
        try:
            for worker in [pool.submit(work) for _ in range(threads)]:
                worker.result()
        except BaseException:  # Ctrl-C too
            stop()
            raise


def read(
    file: Path,
    offset: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    buffer: Tensor | None = None,
) -> Tensor:
    """A tensor of this shape as the file holds it from a byte on, on the CPU.

    buffer  uint8, large enough, to read it into; None for new memory
    """
    wanted = math.prod(shape) * dtype.itemsize
    if buffer is None:
        buffer = torch.empty(wanted, dtype=torch.uint8)
    view = buffer.numpy().data[:wanted]
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(offset)
            held = 0
            while held < wanted:
                count = opened.readinto(view[held:])
                if not count:
                    raise CheckpointError(f"{file}: ends too early; fetch it again")
                held += count
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read it ({error.strerror})") from error
    return buffer[:wanted].view(dtype).view(*shape)


def _convert(take: Callable[[], Part | None], size: int) -> None:
    """One thread's share where no device waits."""
    buffer = torch.empty(size, dtype=torch.uint8)
    while (part := take()) is not None:
        part.target.copy_(part.read(buffer))


def _feed(take: Callable[[], Part | None], device: torch.device, size: int) -> None:
    """One thread's share of a GPU's tensors."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        # The targets may be memory that something on the usual stream has yet to finish with.
        stream.wait_stream(torch.cuda.default_stream(device))
        buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        sent = [torch.cuda.Event(), torch.cuda.Event()]
        with torch.cuda.stream(stream):
            number = 0
            while (part := take()) is not None:
                sent[number].synchronize()  # the last copy out of this buffer
                part.target.copy_(part.read(buffers[number]), non_blocking=True)
                sent[number].record(stream)
                number = 1 - number
        stream.synchronize()


def _pieces(parts: Iterable[Part], size: int) -> Iterator[Part]:
    """The same parts in pieces of at most `size` bytes of a file."""
    for part in parts:
        target, step = part.target.view(-1), size // part.dtype.itemsize
        for start in range(0, len(target), step):
            offset = part.offset + start * part.dtype.itemsize
            yield Part(part.file, offset, part.dtype, target[start : start + step])
