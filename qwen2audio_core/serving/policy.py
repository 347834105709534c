"""What a server allows."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qwen2audio_core.errors import InputError


@dataclass(frozen=True)
class Policy:
    """The limits of a server and whom it trusts.

    name                what the model is called in requests
    api_key             asked of everything but /health; None asks for none
    origins             of web pages that may call it; "*" for any. It then answers as CORS asks
    hosts               names under which it may be called; None for any. With a name for this
                        machine alone, a web page in somebody's browser cannot reach it, neither
                        directly nor by making its own name point here
    allow_files         the folder that file:// URLs may name files of
    allow_private_urls  also download from addresses that are not public ones
    body_bytes          of one request
    held_bytes          bodies and waveforms of all open requests together
    audio_seconds       of all clips of one request
    clips               in one request
    answer_tokens       of one answer, and what it may have where a request does not say
    answers             to one request
    open_requests       being received, waiting or answered
    request_seconds     from the whole body to the last token
    body_seconds        for sending a body
    fetch_seconds       for one download
    workers             threads that decode and tokenize
    """

    name: str
    api_key: str | None = None
    origins: frozenset[str] = frozenset()
    hosts: frozenset[str] | None = None
    allow_files: Path | None = None
    allow_private_urls: bool = False
    body_bytes: int = 64 * 2**20
    held_bytes: int = 2 * 2**30
    audio_seconds: float = 1800.0
    clips: int = 16
    answer_tokens: int = 1024
    answers: int = 8
    open_requests: int = 128
    request_seconds: float = 600.0
    body_seconds: float = 60.0
    fetch_seconds: float = 30.0
    workers: int = 4

    def __post_init__(self) -> None:
        numbers = (
            *("body_bytes", "held_bytes", "clips", "answer_tokens", "answers", "open_requests"),
            *("audio_seconds", "request_seconds", "body_seconds", "fetch_seconds", "workers"),
        )
        for name in numbers:
            if not getattr(self, name) > 0:  # NaN is not, either
                raise InputError(f"{name} is {getattr(self, name)}, it must be above 0")
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):
            raise InputError("the API key must be visible ASCII characters, and nothing between")
        for origin in self.origins:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise InputError(f"origin {origin!r}: expected https://host, with :port, or *")
        if self.allow_files is not None and not self.allow_files.is_dir():
            raise InputError(f"{self.allow_files}: not a folder that files could be allowed of")

    def allowed_file(self, path: str) -> Path | None:
        """The file behind a path if it lies in the allowed folder, links followed, else None."""
        if self.allow_files is None:
            return None
        try:
            real = Path(os.path.realpath(path))
        except ValueError:  # a null character
            return None
        inside = real.is_relative_to(os.path.realpath(self.allow_files))
        return real if inside and real.is_file() else None
