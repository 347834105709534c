"""Qwen2-Audio in plain PyTorch: sound and text in, text out.

load              a checkpoint by hub id, folder or "tiny", as an Assistant
Assistant, Chat   ask, stream, hold a conversation, run a batch
Qwen2Audio        the model; Qwen2AudioConfig is its shape
Settings          how answers are drawn; generate.generate takes it, and encoded prompts
Tokenizer         text to ids and back
InputError        what a person got wrong, in one line

The modules are the reading order: config, ops, frontend, encoder, projector, cache, decoder, model,
then tokenizer, chat, weights, sampling, generate, assistant, cli. Names are imported when first
used, so that the command line starts without loading PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2audio_core.assistant import Assistant as Assistant
    from qwen2audio_core.assistant import Chat as Chat
    from qwen2audio_core.assistant import load as load
    from qwen2audio_core.config import Qwen2AudioConfig as Qwen2AudioConfig
    from qwen2audio_core.errors import InputError as InputError
    from qwen2audio_core.model import Qwen2Audio as Qwen2Audio
    from qwen2audio_core.sampling import Settings as Settings
    from qwen2audio_core.tokenizer import Tokenizer as Tokenizer

_HOME = {
    "Assistant": "assistant",
    "Chat": "assistant",
    "load": "assistant",
    "Qwen2AudioConfig": "config",
    "InputError": "errors",
    "Qwen2Audio": "model",
    "Settings": "sampling",
    "Tokenizer": "tokenizer",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
