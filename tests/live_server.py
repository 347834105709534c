"""A server of the tiny model in a thread of the test's own process, and clients for it."""

import base64
import io
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qwen2audio_core
from qwen2audio_core.assistant import Assistant
from qwen2audio_core.engine import Engine
from qwen2audio_core.serving.policy import Policy
from qwen2audio_core.serving.run import bind, make_server
from qwen2audio_core.serving.service import Service

try:
    import fastapi  # noqa: F401
    import h11  # noqa: F401
    import httpx
    import openai
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    pytest.skip(f"needs the extras serve and test: no {error.name}", allow_module_level=True)

CLIPS = Path(qwen2audio_core.__file__).parent / "assets" / "clips"
NAME = "small"


@dataclass
class Live:
    url: str
    service: Service
    client: openai.OpenAI
    http: httpx.Client
    stop: Callable[[], None]  # as a signal would, and wait for the end

    def chat(self, content: Any = "Hello", **fields: Any) -> Any:
        """An answer to one turn, greedy unless it says otherwise."""
        fields = {"temperature": 0, "max_tokens": 8} | fields
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model=NAME, messages=messages, **fields)

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def metric(self, line: str) -> float:
        """A value of /metrics by the beginning of its line."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(one.rpartition(" ")[2]) for one in lines if one.startswith(line))


@contextmanager
def live(
    assistant: Assistant, engine: dict[str, Any] | None = None, grace: float = 5.0, **policy: Any
) -> Iterator[Live]:
    options = {"max_batch": 4, "max_tokens": 2048, "prefix_bytes": 2**24} | (engine or {})
    service = Service(assistant, Engine(assistant.model, **options), Policy(name=NAME, **policy))
    sock = bind("127.0.0.1", 0)
    server = make_server(service, grace=grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    wait(lambda: server.started)

    def stop() -> None:
        server.should_exit = True
        thread.join(30)

    headers = {"Authorization": f"Bearer {service.policy.api_key or 'none'}"}
    client = openai.OpenAI(
        base_url=url + "/v1", api_key=service.policy.api_key or "none", max_retries=0, timeout=60
    )
    with client, httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as http:
        try:
            yield Live(url, service, client, http, stop)
        finally:
            stop()
            service.close()
    assert not thread.is_alive()


def wait(true: Callable[[], Any], seconds: float = 20.0) -> None:
    """Until something is so; AssertionError after too long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def wav(seconds: float = 1.0, seed: int = 0, rate: int = 16000) -> bytes:
    """A file of noise."""
    samples = np.random.default_rng(seed).normal(0, 2000, round(seconds * rate)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(samples.tobytes())
    return file.getvalue()


def spoken(data: bytes, kind: str = "wav") -> dict[str, Any]:
    """A part with sound."""
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": kind},
    }


def linked(url: str) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": url}}


def small(folder: Path) -> Assistant:
    """The tiny model in float32, where the engine and generate write the same tokens."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder))
    try:
        return qwen2audio_core.load("random", device="cpu", dtype=torch.float32)
    finally:
        patch.undo()
