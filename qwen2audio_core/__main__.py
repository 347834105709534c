"""`python -m qwen2audio_core` and the console command. Ctrl-C is one line from the first moment."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def main() -> None:
    """Import the command line and run it.

    An exception out of Ctrl-C would meet code in mid-import, which may swallow it. Nothing is open
    yet, so the process ends on the spot.
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # and not ignored, as under nohup
        signal.signal(signal.SIGINT, _leave)
    from qwen2audio_core import cli

    signal.signal(signal.SIGINT, usual)
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code != 130:
            raise
        # Python's own way out is slow, and ends by SIGINT where an exec() saw the interrupt pass.
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(130)


if __name__ == "__main__":
    main()
