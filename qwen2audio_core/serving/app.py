"""Routes, and what every request goes through: admission, limits, errors, and callers who leave."""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from qwen2audio_core.hosts import name_in
from qwen2audio_core.serving.chat import Completion
from qwen2audio_core.serving.problems import ApiError, caller_left, problem
from qwen2audio_core.serving.requests import bad, parse_chat, parse_speech
from qwen2audio_core.serving.service import Service, Ticket
from qwen2audio_core.serving.transcriptions import KINDS, Recording

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import Headers
    from starlette.requests import Request
    from starlette.responses import Response

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

CHAT = "/v1/chat/completions"
SPEECH = {"/v1/audio/transcriptions": False, "/v1/audio/translations": True}  # translate?
ENDPOINTS = {CHAT, *SPEECH, "/v1/models", "/health", "/metrics"}
NOTICES = 1000  # characters of the header; proxies take 4 KB of all of them
PING_SECONDS = 15.0  # of silence in a stream, after which a comment shows proxies that it lives

log = logging.getLogger("uvicorn.error")


def create_app(service: Service) -> "FastAPI":
    """The web application of a service, for uvicorn or any other ASGI server."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    policy = service.policy
    # No page of documentation: it would load scripts from other hosts. No redirects to paths with
    # or without a last slash: they would lead past a proxy's prefix.
    app = FastAPI(
        title="qwen2audio", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.add_middleware(_Gate, service=service)
    if policy.origins:  # around the gate: browsers ask what is allowed without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(policy.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # a page of the Internet's, this machine's server
            expose_headers=["x-request-id", "qwen2audio-notices", "retry-after"],
        )

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            paths = ", ".join(sorted(ENDPOINTS))
            return respond(ApiError(404, f"{request.url.path} is not here, expected {paths}"))
        message = f"{request.url.path} with {request.method}: {error.detail}"
        headers = dict(error.headers or {})
        return respond(ApiError(error.status_code, message, headers=headers))

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        ticket: Ticket = request.scope["ticket"]
        body = await _received(request, "application/json", request.body, policy.body_seconds)
        wanted = await service.threads(parse_chat, body, policy)
        completion = Completion(service, wanted, ticket)
        if wanted.stream:
            return await _stream(completion, request, service)

        async def work() -> Response:
            try:
                await completion.begin()
                return JSONResponse(await completion.whole())
            finally:
                completion.run.cancel()

        return await _answered(request, work(), policy.request_seconds, service)

    async def speech(request: Request) -> Response:
        read = partial(request.form, max_files=2, max_fields=64, max_part_size=2**16)
        form = await _received(request, "multipart/form-data", read, policy.body_seconds)
        try:
            files = [item for _, item in form.multi_items() if not isinstance(item, str)]
            upload = form.get("file")
            if upload is None or isinstance(upload, str) or len(files) > 1:
                raise bad("file", "must be one uploaded recording")
            names = set(form) - {"file"}
            texts = {name: [str(value) for value in form.getlist(name)] for name in names}
            recording = Recording(
                service,
                parse_speech(texts, policy),
                request.scope["ticket"],
                SPEECH[request.url.path],
            )
            name = "".join(filter(str.isprintable, upload.filename or ""))[-100:] or "file"
            work = recording.answer(upload.file, name)
            found = await _answered(request, work, policy.request_seconds, service)
        finally:
            await form.close()
        if not isinstance(found, str):
            return JSONResponse(found)
        told = _in_a_header(recording.notices)
        headers = {"qwen2audio-notices": told} if told else None
        return Response(found, media_type=KINDS[texts["response_format"][0]], headers=headers)

    for path in SPEECH:
        app.post(path)(speech)

    get = partial(app.api_route, methods=["GET", "HEAD"])
    about = {
        "id": policy.name,
        "object": "model",
        "created": service.started,
        "owned_by": "qwen2audio",
    }

    @get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [about]})

    @get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != policy.name:
            message = f"there is no model {name!r} here, this server has {policy.name!r}"
            return respond(ApiError(404, message, param="model", code="model_not_found"))
        return JSONResponse(about)

    @get("/health")
    async def health() -> Response:
        up = service.engine.open
        state = {"status": "ok" if up else "the engine has ended", "model": policy.name}
        return JSONResponse(state, 200 if up else 503)

    @get("/metrics")
    async def metrics() -> Response:
        text, kind = service.metrics.text()
        return PlainTextResponse(text, media_type=kind)

    return app


def respond(error: ApiError) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(error.body, error.status, error.headers)


def _in_a_header(notices: list[str]) -> str:
    """As many of them as fit, in the characters that a header has."""
    kept: list[str] = []
    for notice in notices:
        if kept and len("; ".join([*kept, notice])) > NOTICES:
            kept.append(f"and {len(notices) - len(kept)} more")
            break
        kept.append(notice)
    told = " ".join("; ".join(kept).split())
    return told.encode("latin-1", "replace").decode("latin-1")


class _Gate:
    """Lets requests in, holds them to the limits, and turns whatever goes wrong into an answer."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], service: Service):
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, began, status = self._service, time.perf_counter(), 0
        ticket = scope["ticket"] = Ticket(service)
        name = scope["request_id"] = _request_id(scope)
        work = scope["method"] == "POST"
        received = 0

        async def measured() -> Any:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            if received > service.policy.body_bytes:
                raise _too_large(service)
            ticket.take(size)
            return message

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        service.open += work
        service.metrics.open_requests.set(service.open)
        try:
            self._admit(scope)
            await self._app(scope, measured, watched)
        except Exception as error:
            if status:  # the head of an answer has been sent
                raise
            await respond(_explained(error, scope))(scope, receive, watched)
        finally:
            service.open -= work
            service.metrics.open_requests.set(service.open)
            ticket.give_back()
            status = scope.get("outcome", status)
            path, seconds = scope["path"], time.perf_counter() - began
            if work and status == 200:
                service.took(seconds)
            service.metrics.request(path if path in ENDPOINTS else "other", status, seconds)

    def _admit(self, scope: Scope) -> None:
        from starlette.datastructures import Headers

        service, policy, headers = self._service, self._service.policy, Headers(scope=scope)
        if policy.hosts is not None:
            _check_names(headers, policy.hosts, policy.origins)
        if policy.api_key is not None and scope["path"] != "/health":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(key.strip().encode(), policy.api_key.encode())
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "this server wants its API key, as the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] != "POST":
            return
        if service.open > policy.open_requests:
            raise service.busy(f"{policy.open_requests} requests are open already: try again")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > policy.body_bytes:
            raise _too_large(service)


def _explained(error: Exception, scope: Scope) -> ApiError:
    """What a caller is told of an exception; the log has what is ours. The exception loses its
    traceback: with it, it is part of a cycle, through the frames that hold it, which keeps all that
    they hold, such as the request's sound, until a collection that may be long in coming.
    """
    found = problem(error)
    if found.status >= 500 and not isinstance(error, ApiError):
        log.error("%s failed, request %s", scope["path"], scope["request_id"], exc_info=error)
    error.__traceback__ = None
    return found


def _request_id(scope: Scope) -> str:
    """The caller's own name for a request, if it is one that a log can hold, or a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if re.fullmatch("[!-~]{1,100}", given) else f"req_{uuid.uuid4().hex}"


def _check_names(headers: "Headers", hosts: frozenset[str], origins: frozenset[str]) -> None:
    """Refuse calls by another name than this machine's own: they come from somebody's web page."""
    for header, prefix in (("host", "//"), ("origin", "")):
        if header not in headers:
            continue
        if header == "origin" and {headers[header], "*"} & origins:
            continue
        if name_in(prefix + headers[header]) not in hosts:
            raise ApiError(
                403,
                f"the header {header.capitalize()} names {headers[header]!r}: this server answers"
                " to this machine alone; start it with an API key to allow others",
                code="forbidden_host",
            )


def _too_large(service: Service) -> ApiError:
    size = service.policy.body_bytes
    return ApiError(413, f"the body is larger than the {size:,} bytes allowed", code="too_large")


async def _received(
    request: "Request", kind: str, read: Callable[[], Awaitable[T]], seconds: float
) -> T:
    """What a caller sends, of a content type, in time."""
    from starlette.requests import ClientDisconnect

    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != kind:
        raise ApiError(415, f"Content-Type is {given or 'missing'}, expected {kind}")
    try:
        async with asyncio.timeout(seconds):
            return await read()
    except TimeoutError as error:
        raise ApiError(
            408, f"the body took more than {seconds:g} s to come", code="slow_body"
        ) from error
    except ClientDisconnect as error:
        raise caller_left() from error


async def _answered(
    request: "Request", work: Coroutine[Any, Any, T], seconds: float, service: Service
) -> T:
    """Do the work, unless the caller leaves, it takes too long or the server's time is over: then
    it is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    over = asyncio.ensure_future(service.over.wait())
    try:
        done, _ = await asyncio.wait(
            {task, gone, over}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        if gone in done:
            raise caller_left()
        if over in done:
            raise service.ended()
        raise ApiError(504, f"no answer within {seconds:g} s", code="timeout")
    finally:
        for one in (task, gone, over):
            one.cancel()
        await asyncio.gather(task, gone, over, return_exceptions=True)


async def _gone(request: "Request") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(completion: Completion, request: "Request", service: Service) -> "Response":
    """Begin, so that what is wrong with a request has its status; then answer in events."""
    from starlette.responses import Response

    began, seconds = time.monotonic(), service.policy.request_seconds
    try:
        await _answered(request, completion.begin(), seconds, service)
    except BaseException:
        completion.run.cancel()
        raise
    left = max(0.0, seconds - (time.monotonic() - began))

    class Events(Response):
        media_type = "text/event-stream"

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def emit(text: str) -> None:
                body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
                await send(body)

            async def ping() -> None:
                while True:
                    await asyncio.sleep(PING_SECONDS)
                    await emit(": still there\n\n")

            try:
                head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(head)
                pings = asyncio.ensure_future(ping())
                try:
                    # A caller who does not read gets a little longer, to be told of the time-out.
                    work = _emit(completion, emit, left, scope)
                    scope["outcome"] = await _answered(request, work, left + 5, service)
                except ApiError as error:
                    found = _explained(error, scope)
                    scope["outcome"] = found.status
                    if not service.over.is_set():  # nobody is there to be told
                        return
                    await emit(f"data: {json.dumps(found.body)}\n\n")
                finally:
                    pings.cancel()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                completion.run.cancel()

    response = Events(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    del response.headers["content-length"]
    return response


async def _emit(
    completion: Completion, emit: Callable[[str], Awaitable[None]], seconds: float, scope: Scope
) -> int:
    """Server-sent events: every chunk, and at the end [DONE] or the error. Returns its status."""
    try:
        async with asyncio.timeout(seconds):
            async for chunk in completion.chunks():
                await emit(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n")
        await emit("data: [DONE]\n\n")
        return 200
    except Exception as error:
        if isinstance(error, TimeoutError):
            found = ApiError(504, "not finished in time", code="timeout")
        else:
            found = _explained(error, scope)
        await emit(f"data: {json.dumps(found.body)}\n\n")
        return found.status
