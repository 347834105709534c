"""`python -m qwen2audio_core` and the console command. Ctrl-C is one line from the first moment."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the process on the spot while the command line or PyTorch is being imported.

    An exception would meet code in mid-import, which may swallow it, or abort where it is in C++.
    Nothing is open by then. Later it is Python's KeyboardInterrupt.
    """
    needed = ("qwen2audio_core.cli", "torch")
    specs = [getattr(sys.modules.get(name), "__spec__", None) for name in needed]
    if specs[0] is None or any(getattr(spec, "_initializing", False) for spec in specs):
        os.write(2, b"\ninterrupted\n")
        os._exit(130)
    signal.default_int_handler(number, frame)


def main() -> None:
    """Import the command line and run it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, _interrupt)
    from qwen2audio_core import cli

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
