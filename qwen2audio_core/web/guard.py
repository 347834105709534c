"""What the server lets through, and what it forbids the browser."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from qwen2audio_core.hosts import name_in

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# The page is complete in itself. Should an answer hold a picture's address, or a library want a
# font from elsewhere, the browser does not ask for it. Gradio compiles templates: unsafe-eval.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        *(f"{kind}-src 'self' data: blob:" for kind in ("img", "media", "font", "connect")),
        "worker-src 'self' blob:",
        "frame-src 'self'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
SLACK = 2**16  # bytes of an upload that are not the file


class Guard:
    """Middleware around Gradio's own application.

    max_bytes  of an upload, of several files maybe; a larger one is refused before it is stored
    max_call   of any other request's body
    hosts      names that the server is called by; None lets every name through. Somebody's web page
               may have a name of its own point to this machine (DNS rebinding)
    room       how many bytes of uploads there is room for
    """

    def __init__(
        self,
        app: App,
        max_bytes: int,
        max_call: int = 2**20,
        hosts: frozenset[str] | None = None,
        room: Callable[[], int] = lambda: 2**62,
    ):
        self.app = app
        self.max_bytes = max_bytes
        self.max_call = max_call
        self.hosts = hosts
        self.room = room

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = scope["path"], dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and name_in(f"//{host}") not in self.hosts:
            await _refuse(send, 403, f"this server answers to this machine alone, not as {host!r}")
            return
        # What a form on another page could send; reading the answer is forbidden to it anyway.
        site = headers.get(b"sec-fetch-site", b"")
        if scope.get("method") == "POST" and site in (b"cross-site", b"same-site"):
            await _refuse(send, 403, "this server takes nothing from other pages")
            return
        # Gradio would fetch these for whoever asks, with this machine's network.
        if any(part in path for part in ("file=http:", "file=https:", "/proxy=")):
            await _refuse(send, 403, "this server fetches nothing from elsewhere")
            return
        upload = path.rstrip("/").endswith("/upload")
        limit = self.max_bytes + SLACK if upload else self.max_call
        stated = headers.get(b"content-length", b"")
        if stated.isdigit() and int(stated) > limit:
            await _discard(receive, 4 * limit)  # one who is still sending hears no answer
            await _refuse(send, 413, f"larger than {limit >> 20} MB")
            return
        if upload and (int(stated) if stated.isdigit() else limit) > self.room():
            await _discard(receive, 4 * limit)
            await _refuse(send, 507, "too many uploads at the moment: try again in a few minutes")
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            # A body without a stated length that never ends reads as a client that left.
            return message if received <= limit else {"type": "http.disconnect"}

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in HEADERS}
                kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in names]
                message = {**message, "headers": [*kept, *HEADERS]}
            await send(message)

        await self.app(scope, counted, marked)


async def _discard(receive: Receive, limit: int) -> None:
    received, more = 0, True
    while more and received < limit:
        message = await receive()
        received += len(message.get("body", b""))
        more = message.get("more_body", False)


async def _refuse(send: Send, status: int, why: str) -> None:
    body = json.dumps({"detail": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS]})
    await send({"type": "http.response.body", "body": body})
