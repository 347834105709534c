"""The errors a person can cause: one line each, what was wrong, where, and what to do."""


class InputError(ValueError):
    """Something given cannot be used. The command line prints the line and exits with 2."""


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
