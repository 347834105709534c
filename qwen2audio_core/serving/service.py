"""What all requests of a server share."""

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qwen2audio_core.assistant import Assistant
from qwen2audio_core.engine import Engine
from qwen2audio_core.serving.metrics import Metrics
from qwen2audio_core.serving.policy import Policy
from qwen2audio_core.serving.problems import ApiError

T = TypeVar("T")


class Service:
    """A model behind a policy.

    engine  with a worker; `close` ends it
    """

    def __init__(self, assistant: Assistant, engine: Engine, policy: Policy):
        self.assistant = assistant
        self.engine = engine
        self.policy = policy
        self.metrics = Metrics(engine)
        self.started = int(time.time())
        self.open = 0  # requests, counted on the event loop
        self.over = asyncio.Event()  # nobody is answered any more
        # Characters; more cannot fit, however they are tokenized, which takes a second a megabyte.
        # Before that Unicode's form NFC makes one character of up to four.
        self.most_text = 4 * engine.max_tokens * assistant.tokenizer.longest
        self._held = 0
        self._lock = threading.Lock()  # guards _held
        self._typical = 1.0  # s that a request took lately
        self._pool = ThreadPoolExecutor(policy.workers, "prepare")

    async def threads(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a function in one of the threads that prepare requests."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, function, *arguments)

    def cancel(self) -> None:
        """End what is being written, and take nothing new: callers are told that it is over, at
        once, however long the engine's step takes. On the event loop."""
        self.over.set()
        threading.Thread(target=self.engine.close, name="cancel").start()

    def close(self) -> None:
        """End the threads and the engine; what it still writes is cancelled."""
        self._pool.shutdown(cancel_futures=True)
        self.engine.close()

    def took(self, seconds: float) -> None:
        """Learn how long requests take, for `busy` to say when to come back."""
        self._typical += 0.1 * (seconds - self._typical)

    def ended(self) -> ApiError:
        """The error for what the engine answers no more."""
        if not self.over.is_set():
            return ApiError(503, "the engine has ended, see the log", code="engine_ended")
        headers = {"Retry-After": "5"}
        return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)

    def busy(self, why: str) -> ApiError:
        """The error for what there is no room for now."""
        after = str(min(max(1, math.ceil(self._typical)), 60))
        return ApiError(429, why, code="server_busy", headers={"Retry-After": after})


class Ticket:
    """A request's share of the memory that all of them may hold together."""

    def __init__(self, service: Service):
        self._service = service
        self._bytes = 0
        self._over = False

    def take(self, size: int) -> None:
        """Hold so many bytes more. Raises ApiError where there is no room; from any thread.

        A thread may still decode for a request that has ended: then this does nothing.
        """
        service = self._service
        with service._lock:
            if self._over:
                return
            if service._held + size > service.policy.held_bytes:
                raise service.busy("the open requests fill the server's memory: try again")
            service._held += size
            self._bytes += size

    def give_back(self) -> None:
        service = self._service
        with service._lock:
            service._held -= self._bytes
            self._over = True
