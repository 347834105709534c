"""Keys and values of conversations that were read before, for those that begin alike.

A second question about the same clip, or the next turn of a chat, then skips the encoder and the
prefill of all that is the same. Two conversations are the same as far as their ids are, and their
clips, by the SHA-256 of the samples.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

WORTH = 32  # ids that two conversations must share before their cache is


@dataclass
class Beginning:
    """A conversation from its first id on.

    clips  where each clip's places begin among the ids, and the digest of its samples
    saved  what SlotCache.save returned for all of the ids
    """

    ids: list[int]
    clips: list[tuple[int, bytes]]
    saved: list[Tensor] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.saved)

    def shared(self, other: "Beginning") -> int:
        """How many ids two conversations have in common before anything differs."""
        pairs = enumerate(zip(self.ids, other.ids, strict=False))
        shortest = min(len(self.ids), len(other.ids))
        same = next((i for i, (mine, theirs) in pairs if mine != theirs), shortest)
        for (start, mine), (_, theirs) in zip(self.clips, other.clips, strict=False):
            if start < same and mine != theirs:
                return start
        return same


class PrefixCache:
    """The conversations read last, as many as `limit` bytes hold; the longest unused goes first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes = 0
        self._entries: list[Beginning] = []  # the one used last at the end

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, wanted: Beginning) -> tuple[Beginning | None, int]:
        """What was read that begins most like `wanted`, and how many ids of it serve.

        The last id of `wanted` never does: its logits have to be computed.
        """
        best, most = None, WORTH - 1
        for entry in self._entries:
            shared = min(entry.shared(wanted), len(wanted.ids) - 1)
            if shared > most:
                best, most = entry, shared
        if best is None:
            return None, 0
        self._entries.remove(best)
        self._entries.append(best)
        return best, most

    def holds(self, wanted: Beginning) -> bool:
        """Whether all of `wanted` is there already."""
        return any(entry.shared(wanted) == len(wanted.ids) for entry in self._entries)

    def add(self, new: Beginning) -> None:
        """Keep a conversation instead of those that it continues."""
        if new.bytes > self.limit:
            return
        kept = [entry for entry in self._entries if entry.shared(new) < len(entry.ids)]
        kept.append(new)
        while sum(entry.bytes for entry in kept) > self.limit:
            kept.pop(0)
        self._entries = kept
        self.bytes = sum(entry.bytes for entry in kept)


def digest(waveform: Tensor) -> bytes:
    """What a clip is known by."""
    return hashlib.sha256(waveform.detach().cpu().contiguous().numpy().data).digest()


def runs(ids: Sequence[int], token: int) -> list[tuple[int, int]]:
    """(start, length) of each unbroken run of a token."""
    found: list[tuple[int, int]] = []
    for i, one in enumerate(ids):
        if one != token:
            continue
        if found and sum(found[-1]) == i:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((i, 1))
    return found
