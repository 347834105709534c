"""Keys and values of conversations that were read before, for those that begin alike.

A second question about the same clip, or the next turn of a chat, then skips the encoder and the
prefill of all that is the same. Two conversations are the same as far as their ids are, and their
clips, by the SHA-256 of the samples.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, zip_longest

from torch import Tensor

WORTH = 32  # ids that two conversations must share before their cache is
LOOKS = 8  # conversations that are compared id by id


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

    @cached_property
    def keys(self) -> list[int]:
        """One for each block of WORTH ids: alike where all up to its end is, clips among it."""
        keys, key = list[int](), 0
        for start in range(0, len(self.ids) - WORTH + 1, WORTH):
            end = start + WORTH
            clips = [clip for clip in self.clips if start <= clip[0] < end]
            key = hash((key, *self.ids[start:end], *clips))
            keys.append(key)
        return keys

    def shared(self, other: "Beginning") -> int:
        """How many ids two conversations have in common before anything differs."""
        same, shortest = 0, min(len(self.ids), len(other.ids))
        while same < shortest and self.ids[same : same + WORTH] == other.ids[same : same + WORTH]:
            same = min(same + WORTH, shortest)
        while same < shortest and self.ids[same] == other.ids[same]:
            same += 1
        for mine, theirs in zip_longest(self.clips, other.clips, fillvalue=(same, b"")):
            if mine != theirs:  # or only one of them has a clip there
                return min(same, mine[0], theirs[0])
        return same


class PrefixCache:
    """The conversations read last, as many as `limit` bytes hold; the longest unused goes first.

    They are found by the keys of their blocks, so that looking takes no longer for many of them.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes = 0
        self._count = 0
        self._entries: dict[int, Beginning] = {}  # by number; the one used last at the end
        self._blocks: dict[int, dict[int, None]] = {}  # key -> numbers of those that have it
        self._ends: dict[int, dict[int, None]] = {}  # key -> numbers of those whose last it is

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, wanted: Beginning) -> tuple[Beginning | None, int]:
        """What was read that begins most like `wanted`, and how many ids of it serve.

        Where more than LOOKS conversations are alike up to a block, only the newest of them are
        compared beyond it: others may have had less than a block more. The last id of `wanted`
        never serves: its logits have to be computed.
        """
        best, most = None, WORTH - 1
        for number in self._alike(wanted):
            shared = min(self._entries[number].shared(wanted), len(wanted.ids) - 1)
            if shared > most:
                best, most = number, shared
        if best is None:
            return None, 0
        entry = self._entries[best] = self._entries.pop(best)
        return entry, most

    def holds(self, wanted: Beginning) -> bool:
        """Whether all of `wanted` is there already."""
        alike = self._alike(wanted)
        return any(self._entries[number].shared(wanted) == len(wanted.ids) for number in alike)

    def _alike(self, wanted: Beginning) -> Iterator[int]:
        """The newest of those that have most of its blocks."""
        found: dict[int, None] = {}
        for key in wanted.keys:
            if key not in self._blocks:
                break
            found = self._blocks[key]
        return islice(reversed(found), LOOKS)

    def add(self, new: Beginning) -> None:
        """Keep a conversation instead of those that it continues."""
        if new.bytes > self.limit or not new.keys:
            return
        self.make_room(new, new.bytes)
        self._count += 1
        self._entries[self._count] = new
        self.bytes += new.bytes
        for key in new.keys:
            self._blocks.setdefault(key, {})[self._count] = None
        self._ends.setdefault(new.keys[-1], {})[self._count] = None

    def make_room(self, new: Beginning, size: int) -> None:
        """Remove what `new` continues, then the oldest, until `size` bytes for it fit."""
        for key in new.keys:
            for number in list(self._ends.get(key, ())):
                entry = self._entries[number]
                if entry.shared(new) == len(entry.ids):
                    self._remove(number)
        while self._entries and self.bytes + size > self.limit:
            self._remove(next(iter(self._entries)))

    def _remove(self, number: int) -> None:
        entry = self._entries.pop(number)
        self.bytes -= entry.bytes
        for index, keys in ((self._blocks, entry.keys), (self._ends, entry.keys[-1:])):
            for key in keys:
                del index[key][number]
                if not index[key]:
                    del index[key]


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
