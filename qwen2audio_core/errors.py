"""The errors a person can cause: one line each, what was wrong, where, and what to do."""

import copy
import sys
import warnings


class Notice(UserWarning):
    """Worth knowing and no error, such as where a long clip was split."""


warnings.simplefilter("always", Notice, append=True)  # each one, unless a filter says otherwise


def warn(line: str) -> None:
    """A Notice as of the line outside this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("qwen2audio_core"):
        frame, level = frame.f_back, level + 1
    warnings.warn(line, Notice, stacklevel=level)


class InputError(ValueError):
    """Something given cannot be used. The command line prints the line and exits with 2."""


def inside(where: str, error: InputError) -> InputError:
    """The same error, told of one among several."""
    found = copy.copy(error)
    found.args = (f"{where}: {error}",)
    return found


class AudioError(InputError):
    """A clip that cannot be read, or that holds nothing the model could hear.

    what     the line
    command  installs what is missing, told behind it to whoever runs this program. It names folders
             and is no help to who sent a clip to a server: `remote` is the line for those
    """

    def __init__(self, what: str, command: str = ""):
        super().__init__(f"{what}: {command}" if command else what)
        self.remote = f"{what}, which this server does not have" if command else what


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, malformed, of another model, or whose weights give
    numbers that are not finite."""


class PromptError(InputError):
    """A conversation that cannot be turned into tokens, such as clips and places that differ."""
