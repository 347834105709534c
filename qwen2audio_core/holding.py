"""One process at a time in a folder that a run writes to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen2audio_core.errors import InputError


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs of this machine out of a folder; it is made, and removed if it stays empty.

    A process that ends, in whatever way, holds nothing any more. Where the system or the disk knows
    no such locks (Windows, some network disks) nobody is kept out.

    errors  InputError where another run is in it, or it cannot be made
    """
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from error
    try:
        with _locked(folder):
            yield
    finally:
        if new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another run is writing there: wait for it, or choose another folder"
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(place)
