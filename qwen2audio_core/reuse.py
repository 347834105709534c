"""What the next turn of a conversation need not read again.

A turn begins with all that was read and written before it. As far as its ids and its clips are the
same, the keys and values that the last answer left serve again, if the model is still what it was.
The engine has a cache of its own for many conversations (prefix_cache.py).
"""

import weakref
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from qwen2audio_core.packed_linear import version

# Hooks, tensors and modules, looked at by themselves.
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(eq=False)
class Read:
    """A prompt that was read, or is to be.

    mel          (n, M, F), of its clips, or None; conv_frames (n,), their lengths, or None
    """

    ids: list[int]
    mel: Tensor | None
    conv_frames: Tensor | None

    def clips(self, first: int) -> tuple[Tensor | None, Tensor | None]:
        """mel and conv_frames from a clip on, None where there is none."""
        if self.mel is None or self.conv_frames is None or first >= len(self.mel):
            return None, None
        return self.mel[first:], self.conv_frames[first:]

    def clip(self, number: int) -> Tensor | None:
        """The log-mel of a clip, (M, frames that the encoder sees); None where there is none."""
        if self.mel is None or self.conv_frames is None or number >= len(self.mel):
            return None
        return self.mel[number, :, : 2 * int(self.conv_frames[number]) + 1]


def shared(before: Read, now: Read, audio_token_id: int) -> tuple[int, int]:
    """How many ids two conversations begin with alike, and how many clips are among them.

    The last id of `now` does not count: its logits have to be computed. Nor does part of a clip.
    """
    pairs = zip(before.ids, now.ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if same is None:
        same = min(len(before.ids), len(now.ids) - 1)
    begins = [
        i
        for i in range(same)
        if now.ids[i] == audio_token_id and (i == 0 or now.ids[i - 1] != audio_token_id)
    ]
    for number, begin in enumerate(begins):
        mine, theirs = before.clip(number), now.clip(number)
        last = number == len(begins) - 1
        cut = last and now.ids[same - 1] == now.ids[same] == audio_token_id
        if mine is None or theirs is None or not torch.equal(mine, theirs) or cut:
            return begin, number
    return same, len(begins)


class Fingerprint:
    """What a model's answers depend on, to be compared with what that is later.

    Of every module: its class with all functions of it, its own attributes (op slots, an eps, a
    `forward`), its place. Of every tensor: which it is, and what was changed in it in place as far
    as PyTorch counts that (see linear.py). Hooks may do anything: a model with hooks is like no
    other, nor like itself. It keeps no module and no tensor in memory.
    """

    def __init__(self, model: nn.Module):
        self._parts: list[Any] = []
        kinds: dict[type, None] = {}
        hooks = torch.nn.modules.module
        watched = bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
        for _, module in model.named_modules(remove_duplicate=False):
            kinds[type(module)] = None
            self._parts += [_mark(module), type(module), module.training]
            for name, value in vars(module).items():
                if name not in OF_EVERY_MODULE:
                    self._add(value)
            watched = watched or bool(module._forward_hooks or module._forward_pre_hooks)
        for kind in kinds:
            above = [one for one in kind.__mro__ if issubclass(one, nn.Module)]
            self._parts += [part for one in above for part in vars(one).values()]
        for tensors in (model.named_parameters, model.named_buffers):
            for _, tensor in tensors(remove_duplicate=False):
                place = 0 if tensor.is_mkldnn else tensor.data_ptr()
                self._parts += [_mark(tensor), place, version(tensor)]
        if watched:
            self._parts.append(object())

    def _add(self, value: Any) -> None:
        """An attribute; of what holds others, what it holds."""
        if isinstance(value, (list, tuple, dict)):
            self._parts += [type(value), len(value)]
            for one in value.items() if isinstance(value, dict) else value:
                self._add(one)
        else:
            self._parts.append(_mark(value))

    def is_of(self, other: "Fingerprint") -> bool:
        return all(
            a is b or (isinstance(a, (int, float, str)) and type(a) is type(b) and a == b)
            for a, b in zip_longest(self._parts, other._parts, fillvalue=...)
        )


def _mark(thing: Any) -> Any:
    """The same for the same object, without keeping it; numbers and the like are their own mark."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return thing
