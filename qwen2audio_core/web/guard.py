"""What the server lets through, and what it forbids the browser."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

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

    max_bytes  of an upload; a larger one is refused before it is stored
    max_call   of any other request's body
    """

    def __init__(self, app: App, max_bytes: int, max_call: int = 2**20):
        self.app = app
        self.max_bytes = max_bytes
        self.max_call = max_call

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        # Gradio would fetch these for whoever asks, with this machine's network.
        if any(part in path for part in ("file=http:", "file=https:", "/proxy=")):
            await _refuse(send, 403, "this server fetches nothing from elsewhere")
            return
        upload = path.rstrip("/").endswith("/upload")
        limit = self.max_bytes + SLACK if upload else self.max_call
        stated = dict(scope["headers"]).get(b"content-length", b"")
        if stated.isdigit() and int(stated) > limit:
            await _discard(receive, 4 * limit)  # one who is still sending hears no answer
            await _refuse(send, 413, f"larger than {limit >> 20} MB")
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
