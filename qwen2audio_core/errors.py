"""The errors a person can cause: one line each, what was wrong, where, and what to do."""


class InputError(ValueError):
    """Something given cannot be used. The command line prints the line and exits with 2."""


class AudioError(InputError):
    """A clip that cannot be read, or that holds nothing the model could hear."""


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, malformed or of another model."""


class PromptError(InputError):
    """A conversation that cannot be turned into tokens, such as clips and places that differ."""
