"""From the options of the command line to a running server, and to its clean end.

SIGTERM or Ctrl-C, once it answers: no new connection is taken, what is being answered is finished,
then the process ends with code 0. What is not finished within `grace` seconds is cancelled, and its
callers are told so. Before that they break the start off, with code 143 and 130.
"""

import asyncio
import errno
import math
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from qwen2audio_core import install
from qwen2audio_core.assistant import Assistant
from qwen2audio_core.engine import Engine
from qwen2audio_core.errors import InputError
from qwen2audio_core.serving.app import create_app
from qwen2audio_core.serving.policy import Policy
from qwen2audio_core.serving.service import Service
from qwen2audio_core.terminal import note

LAST_WORDS = 5  # s for telling callers that their time is over; then connections are cut


def check_installed() -> None:
    """Raise InputError where the extra `serve` is missing."""
    try:
        import fastapi  # noqa: F401
        import h11  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"the server needs {error.name}: {install.extra('serve')}") from error


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM unwinds what runs, as Ctrl-C does: alone it would end the process where it is, or, as
    the first process of a container, do nothing."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, before minutes are spent on a model. 0 picks a free port.

    It does not listen yet, so that callers are refused and not left waiting until the model is
    there; a server that is started at the same time may therefore still take the port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen at {host} port {port}: {why}") from error
    return sock


def serve(
    sock: socket.socket,
    assistant: Assistant,
    policy: Policy,
    engine_options: dict[str, Any],
    *,
    access_log: bool = False,
    grace: float = 60.0,
) -> None:
    """Answer at a bound socket until a signal comes."""
    engine = Engine(assistant.model, **engine_options)
    if engine.max_tokens < engine_options.get("max_tokens", 0):
        note(f"the model's own context is {engine.max_tokens:,} tokens, --context is lowered to it")
    service = Service(assistant, engine, policy)
    try:
        engine.warm()
        server = make_server(service, access_log=access_log, grace=grace)
        # uvicorn takes the signals over a moment later; one that comes before must not be lost.
        # Once it is through with the requests it raises them again: then this changes nothing.
        before = signal.signal(signal.SIGTERM, server.handle_exit)
        interrupt = signal.signal(signal.SIGINT, server.handle_exit)
        try:
            server.run(sockets=[sock])
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            host, port = sock.getsockname()[:2]
            raise InputError(
                f"another program has begun to listen at {host} port {port} meanwhile"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, before)
            signal.signal(signal.SIGINT, interrupt)
    finally:
        service.close()


def make_server(service: Service, *, access_log: bool = False, grace: float = 60.0) -> Any:
    """A uvicorn.Server of a service; it says where it listens once it does."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            loop = asyncio.get_running_loop()
            late = loop.call_later(grace, service.cancel)
            await super().shutdown(sockets)
            late.cancel()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for one in sockets or []:
                host, port = one.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                note(f"{service.policy.name} answers at http://{host}:{port}/v1 (Ctrl-C ends it)")

    handlers = {"class": "logging.StreamHandler", "formatter": "plain"}  # to stderr
    level = {"handlers": ["stderr"], "level": "WARNING", "propagate": False}
    config = uvicorn.Config(
        create_app(service),
        lifespan="off",
        access_log=access_log,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(grace) + LAST_WORDS,
        log_config={
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
            "handlers": {"stderr": handlers},
            "loggers": {
                "uvicorn": level,
                "uvicorn.error": level,
                "uvicorn.access": {**level, "level": "INFO"},
            },
        },
    )
    return Server(config)
