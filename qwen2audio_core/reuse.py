"""What the next turn of a conversation need not read again.

A turn begins with all that was read and written before it. As far as its ids and its clips are the
same, the keys and values that the last answer left serve again, if the model is still what it was.
The engine has a cache of its own for many conversations (prefix_cache.py).
"""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from qwen2audio_core.linear import version


@dataclass(eq=False)
class Read:
    """What a cache holds of one conversation.

    ids          of its filled positions
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
    """Everything in a model that its answers depend on, to be compared with what it is later.

    Its tensors and what was changed in them in place, as far as PyTorch counts it (linear.py); the
    functions in its op slots; a `forward` of an object's own; hooks, which may do anything: a model
    with hooks is like no other.
    """

    def __init__(self, model: nn.Module):
        self._parts: list[Any] = []
        for module in model.modules():
            own = vars(module)
            self._parts += [own[name] for name in own if name.endswith("_op") or name == "forward"]
            if module._forward_hooks or module._forward_pre_hooks:
                self._parts.append(object())
        for tensor in (*model.parameters(), *model.buffers()):
            self._parts += [tensor, tensor.data_ptr(), version(tensor)]

    def is_of(self, other: "Fingerprint") -> bool:
        return all(
            a is b or (isinstance(a, int) and a == b)
            for a, b in zip_longest(self._parts, other._parts, fillvalue=...)
        )
