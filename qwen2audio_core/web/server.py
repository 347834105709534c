"""The page on the network: where it listens, what it is told to leave alone, and how it ends."""

import errno
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hmac import compare_digest
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2audio_core.errors import InputError
from qwen2audio_core.hosts import is_loopback, own_names
from qwen2audio_core.tiny import which
from qwen2audio_core.web import app
from qwen2audio_core.web.guard import Guard
from qwen2audio_core.web.page import theme
from qwen2audio_core.web.sessions import Limits, Sessions
from qwen2audio_core.web.worker import Worker

if TYPE_CHECKING:
    from qwen2audio_core.assistant import Assistant

PORT = 7860  # and the hundred behind it
SWEEP_SECONDS = 30.0
UPLOADS = 20  # files of the largest size that are kept at a time, of all pages together
STYLE = Path(__file__).with_name("style.css")


@contextmanager
def serving(
    assistant: "Assistant",
    *,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    password: str | None = None,
    share: bool = False,
) -> Iterator[list[str]]:
    """Serve the page as long as the block runs; then stop the model and remove every file.

    host      address or name to listen on
    port      None takes the first free one from 7860
    password  asked for before anything else, with any name
    share     also ask Gradio's servers for a public address
    yields    the addresses, this machine's own first
    errors    InputError: the port is taken, the host is not one of this machine's
    """
    wanted, port = port, free_port(host, port)
    limits = limits or Limits()
    folder = Path(tempfile.mkdtemp(prefix="qwen2audio-web-")).resolve()  # for this user alone
    with environment(folder), fetching_nothing():
        from starlette.middleware import Middleware

        worker = Worker(limits.waiting)
        sessions = Sessions(assistant, worker, folder, limits)
        device = str(assistant.device)
        kind = str(assistant.dtype).removeprefix("torch.")
        title = f"{assistant.name or 'model'} · {device} · {kind}"
        blocks = app.build(sessions, title, which(assistant.model))
        alone = is_loopback(host) and password is None and not share
        guard = Middleware(
            Guard,
            # Gradio holds each file to its limit, this their sum.
            max_bytes=limits.clips * limits.upload_bytes,
            hosts=own_names(host) if alone else None,
            room=lambda: UPLOADS * limits.upload_bytes - sessions.stored,
        )
        over = threading.Event()
        sweeper = threading.Thread(target=_sweep, args=(sessions, over), daemon=True)
        sweeper.start()
        try:
            launch = partial(
                blocks.launch,
                server_name=host,
                share=share,
                auth=None if password is None else lambda _, given: _same(given, password),
                auth_message="Type any name; the password is the one that the server was given.",
                theme=theme(),
                css_paths=STYLE,
                max_file_size=limits.upload_bytes,
                app_kwargs={"middleware": [guard]},
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
            )
            try:
                _, local, public = launch(server_port=port)
            except OSError:  # somebody else took it meanwhile
                _, local, public = launch(server_port=free_port(host, wanted))
            yield [address.rstrip("/") for address in (local, public) if address]
        finally:
            over.set()
            worker.close()
            blocks.close(verbose=False)
            sweeper.join()
            sessions.close()


@contextmanager
def environment(folder: Path) -> Iterator[None]:
    """What Gradio reads as it is imported, or whenever it needs it; put back at the end."""
    known = {"no_proxy": os.environ.get("no_proxy", ""), "NO_PROXY": os.environ.get("NO_PROXY", "")}
    local = "localhost,127.0.0.1,::1"  # it asks itself whether it is there: never through a proxy
    changes = {
        **{name: f"{value},{local}".lstrip(",") for name, value in known.items()},
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),  # else a table after every click
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def fetching_nothing() -> Iterator[None]:
    """Gradio would download what an event of a page names by its URL."""
    from gradio import processing_utils

    async def refused(url: str, *words: object) -> str:
        raise ValueError(f"this server fetches nothing from elsewhere: {url:.200}")

    names = ("async_ssrf_protected_download", "ssrf_protected_download")
    before = {name: getattr(processing_utils, name) for name in names}
    for name in names:
        setattr(processing_utils, name, refused)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(processing_utils, name, function)


def _same(given: str, password: str) -> bool:
    return compare_digest(given.encode(), password.encode())


def _sweep(sessions: Sessions, over: threading.Event) -> None:
    limits = sessions.limits
    shortest = min(limits.closed, limits.idle, limits.upload)
    while not over.wait(min(SWEEP_SECONDS, max(shortest / 2, 0.1))):
        sessions.sweep()


def free_port(host: str, port: int | None) -> int:
    """The port asked for, or the first free one. InputError where there is none."""
    for candidate in (port,) if port is not None else range(PORT, PORT + 100):
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, candidate, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return candidate
        except socket.gaierror as error:
            raise InputError(f"host {host!r} is not known: {error.strerror}") from error
        except PermissionError as error:
            raise InputError(f"port {candidate} needs more rights: take one from 1024") from error
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InputError(f"host {host} is not an address of this machine") from error
            if port is not None:
                raise InputError(f"port {port} is taken: give another --port") from error
    raise InputError(f"ports {PORT} to {PORT + 99} are all taken: give another --port")


def warnings(host: str, share: bool, password: str | None) -> list[str]:
    """What a person should know before others can reach the page."""
    found = []
    if not is_loopback(host):
        who = "anyone who can reach this machine" if password is None else "whoever knows it"
        found.append(
            f"listening on {host}: {who} can use the model"
            + (", set --password" if password is None else "")
        )
        found.append(
            "browsers allow the microphone only on localhost or over https: other machines can"
            " upload but not record, unless something in front of this adds https"
        )
    if share:
        found.append(
            "--share on sends everything through Gradio's servers"
            + (", open to anyone with the address: set --password" if password is None else "")
        )
    return found
