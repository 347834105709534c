"""What the commands share at a terminal: loading with a word about the model, notices, output."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # PyTorch takes seconds to load; the help text does not wait for it
    from qwen2audio_core.assistant import Assistant

URLS = ("http://", "https://", "data:", "file://")


def load(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    no_pack: bool = False,
    quantize: Literal["int8", "int4"] | None = None,
) -> "Assistant":
    """The model that a command's options name; says on stderr what it should not be taken for.

    A script that calls often sets QWEN2AUDIO_NO_NOTICE=1 once that was said.
    """
    import torch

    from qwen2audio_core import assistant, packed_linear, tiny

    packed_linear.limit_shapes()
    kind = None if dtype is None else getattr(torch, dtype)
    pack = False if no_pack else None
    loaded = assistant.load(model, device, kind, pack=pack, quantize=quantize)
    if not os.environ.get("QWEN2AUDIO_NO_NOTICE") and (small := tiny.which(loaded.model)):
        note(tiny.WARNINGS[small])
    return loaded


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep decoders written in C from printing to stderr; Python's own messages still arrive."""
    sys.stderr.flush()
    python, real = sys.stderr, os.dup(2)
    silent = os.open(os.devnull, os.O_WRONLY)
    try:
        if python.fileno() == 2:
            sys.stderr = os.fdopen(os.dup(real), "w", buffering=1)
    except (OSError, ValueError):
        pass  # already redirected by whoever runs us
    os.dup2(silent, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = python
        os.dup2(real, 2)
        os.close(real)
        os.close(silent)


def note(line: str) -> None:
    """A line for the person, on stderr."""
    print(line, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """A piece of the answer, on stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """Text without the control characters that could drive a terminal; newlines and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def memory_line(error: BaseException) -> str | None:
    """What to tell a person whose memory is full; None for any other error."""
    if isinstance(error, MemoryError):
        return "out of memory: try --dtype bfloat16, a shorter clip, or a smaller model"
    if re.search("out of memory|allocate memory", str(error), re.I):
        return f"out of memory: {str(error).splitlines()[0]}"
    return None
