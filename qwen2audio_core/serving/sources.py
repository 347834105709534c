"""Clips of a request to waveforms: what is downloaded, what is read, what is refused."""

import asyncio
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qwen2audio_core import audio
from qwen2audio_core.audio_files import source_name
from qwen2audio_core.errors import AudioError
from qwen2audio_core.frontend import SAMPLE_RATE
from qwen2audio_core.serving.fetch import fetch
from qwen2audio_core.serving.policy import Policy
from qwen2audio_core.serving.problems import ApiError
from qwen2audio_core.serving.requests import Clip


async def download(clips: Sequence[Clip], policy: Policy) -> list[Clip]:
    """The same clips, those behind http URLs with their bytes. Raises ApiError."""

    async def one(clip: Clip) -> Clip:
        if isinstance(clip.source, bytes) or _scheme(clip.source) not in ("http", "https"):
            return clip
        try:
            content = await fetch(
                clip.source,
                private=policy.allow_private_urls,
                max_bytes=policy.body_bytes,
                seconds=policy.fetch_seconds,
            )
        except AudioError as error:
            raise _unheard(clip.where, error) from error
        return Clip(content, clip.where)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(clip)) for clip in clips]
    return [task.result() for task in tasks]


def decode(clips: Sequence[Clip], policy: Policy) -> list[Tensor]:
    """Downloaded clips to waveforms (N,), 16 kHz mono, within the seconds allowed for all of them.

    errors   ApiError, naming the field
    """
    waveforms: list[Tensor] = []
    left = policy.audio_seconds
    for clip in clips:
        waveforms.append(waveform(clip.source, clip.where, policy, left))
        left -= len(waveforms[-1]) / SAMPLE_RATE
    return waveforms


def waveform(source: Any, where: str, policy: Policy, seconds: float, name: str = "") -> Tensor:
    """One clip, bytes or a binary file or a data: or file: URL, to a waveform (N,)."""
    if isinstance(source, str):
        name = source_name(source)
        if _scheme(source) == "file":
            path = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
            source = policy.allowed_file(path)
            if source is None:  # the same word for a file that is not there: nothing is disclosed
                raise ApiError(
                    400,
                    f"{where}: {name} is not a file in a folder that is allowed here",
                    param=where,
                    code="forbidden_file",
                )
        else:
            assert _scheme(source) == "data"
    try:
        return audio.load(source, name=name or where, max_seconds=max(seconds, 0))
    except AudioError as error:
        raise _unheard(where, error) from error


def _unheard(where: str, error: AudioError) -> ApiError:
    line = error.remote if error.remote.startswith(where) else f"{where}: {error.remote}"
    return ApiError(400, line, param=where, code="invalid_audio")


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()
