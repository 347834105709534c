"""Work that a GPU does again without Python: CUDA graphs, recorded where they are first needed."""

import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

import torch

UNIT = 64  # what lengths are rounded up to; longer ones to a multiple

Record = Callable[[Callable[[], None]], Callable[[], None]]


def padded(length: int) -> int:
    """The length that is recorded for this one: the next multiple of 64, of 128 above 512, of 256
    above 1,024, and so on."""
    unit = UNIT
    while length > 8 * unit:
        unit *= 2
    return -(-length // unit) * unit


class Recordings:
    """Functions of no arguments by a key each, recorded when they are first run.

    record  makes a function repeatable: `record_graph` on a GPU. It runs it a few times, so that
            doing it several times must come to the same as doing it once
    """

    def __init__(self, record: Record):
        self._record = record
        self.made: dict[Hashable, Callable[[], None]] = {}

    def run(
        self,
        key: Hashable,
        function: Callable[[], None],
        while_recording: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Run what was recorded under a key, or record the function."""
        made = self.made  # `forget` may put another in its place
        if key not in made:
            with while_recording():
                made[key] = self._record(function)
        made[key]()

    def forget(self) -> None:
        """Record anew what is needed again: what the functions do has changed. Hooks, and all else
        that happens in Python, happen while recording and not afterwards."""
        self.made = {}


_recording = threading.Lock()  # a recording in one thread forbids what begins one in another


def record_graph(device: torch.device) -> Record:
    """A recorder for `Recordings`: CUDA graphs that share one pool of memory. What they give must
    lie outside of it."""
    with _recording, torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        first = torch.cuda.CUDAGraph()  # a pool whose last graph is gone takes no other one
        with torch.cuda.graph(first, pool, stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)

    def record(step: Callable[[], None]) -> Callable[[], None]:
        with _recording, torch.cuda.device(device):
            # Kernels are compiled and libraries opened outside the recording.
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile, for the log-mels of the next request.
            with torch.cuda.graph(graph, first.pool(), stream, capture_error_mode="thread_local"):
                step()
        replay: Callable[[], None] = graph.replay
        return replay

    return record
