"""What went wrong, in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from qwen2audio_core.errors import AudioError, CheckpointError, InputError
from qwen2audio_core.terminal import memory_line

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is not answered.

    status   of HTTP
    param    the field that is to blame
    code     a word for programs
    headers  to send along
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(_writable(message))
        self.status = status
        self.param = None if param is None else _writable(param)
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        content = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": content}


def _writable(text: str) -> str:
    """JSON can hold half a surrogate pair, and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def caller_left() -> ApiError:
    """For the log and the count, nobody will read it."""
    return ApiError(499, "the caller has left", code="caller_left")


def problem(error: Exception) -> ApiError:
    """What a caller is told of an exception: all of what is theirs, nothing of what is ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ExceptionGroup):  # of tasks side by side, the first to fail
        return problem(error.exceptions[0])
    if isinstance(error, InputError) and not isinstance(error, CheckpointError):
        code = "invalid_audio" if isinstance(error, AudioError) else None
        return ApiError(400, str(error), code=code)
    if memory_line(error):
        return ApiError(
            503,
            "the server is out of memory: send less audio, or try again later",
            code="out_of_memory",
            headers={"Retry-After": "5"},
        )
    return ApiError(500, "the server failed, its log says why", code="internal_error")
