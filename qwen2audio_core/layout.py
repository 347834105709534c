"""What stands at each position of a conversation, and which second of sound an audio token is.

layout = Layout.of(prompt.ids, tokenizer, reply.ids)
layout["audio 1"]                  slice of the first clip's tokens
layout.columns("text")             every position that holds a user's words
layout.seconds(layout["audio 1"].start)        (1, 0.0, 0.04)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen2audio_core.chat import AUDIO, AUDIO_BOS, AUDIO_EOS
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import SECONDS_PER_TOKEN
from qwen2audio_core.tokenizer import Tokenizer

_CONTENT = {b"system": "system", b"user": "text", b"assistant": "answer"}


@dataclass(frozen=True)
class Layout:
    """Each position's token and kind.

    ids      (T,)
    kinds    (T,)  "template": the markup of turns and clips; "system", "text", "answer": what a
             turn of system, user or assistant says; "audio 1", "audio 2", ...: a clip's tokens
    pieces   (T,)  the text of each token, incomplete characters as U+FFFD
    """

    ids: list[int]
    kinds: list[str]
    pieces: list[str]

    @classmethod
    def of(cls, ids: Sequence[int], tokenizer: Tokenizer, answer: Sequence[int] = ()) -> "Layout":
        """Read the published template, or a raw prompt, out of its ids.

        answer   ids written behind the prompt, all of which count as "answer"
        """
        pieces = [tokenizer.bytes_of(token, skip_special=False) for token in [*ids, *answer]]
        special = {tokenizer.id_of(name): name for name in (AUDIO, AUDIO_BOS, AUDIO_EOS)}
        start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
        markup = {start, end, *special}
        kinds: list[str] = []
        content = "text"  # of a prompt without turns
        clips, before, at = 0, -1, 0
        while at < len(ids):
            token = ids[at]
            if token in markup:
                if special.get(token) == AUDIO:
                    clips += before != token
                    kinds.append(f"audio {clips}")
                else:
                    kinds.append("template")
                before, at = token, at + 1
                continue
            stop = next((i for i in range(at, len(ids)) if ids[i] in markup), len(ids))
            run = b"".join(pieces[at:stop])
            head = tail = 0  # bytes of markup around what is said
            if before == start:
                role, line, _ = run.partition(b"\n")
                content, head = _CONTENT.get(role, "text"), len(role + line)
            elif before == end:
                head = len(run)
            elif special.get(before) == AUDIO_EOS and start in ids:
                head = run.startswith(b"\n")
            if stop < len(ids) and special.get(ids[stop]) == AUDIO_BOS and start in ids:
                number = re.search(rb"Audio \d+: $", run)
                tail = len(number[0]) if number else 0
            place = 0
            for piece in pieces[at:stop]:
                said = head <= place < max(head, len(run) - tail)
                kinds.append(content if said else "template")
                place += len(piece)
            before, at = ids[stop - 1], stop
        kinds += ["answer"] * len(answer)
        return cls([*ids, *answer], kinds, [piece.decode("utf-8", "replace") for piece in pieces])

    def columns(self, kind: str) -> list[int]:
        """Every position of a kind; "audio" is all clips."""
        audio = kind == "audio"
        found = [i for i, own in enumerate(self.kinds) if own == kind or (audio and is_audio(own))]
        if not found:
            known = ", ".join(dict.fromkeys(self.kinds))
            raise InputError(f"the conversation holds no {kind!r}, it has {known}")
        return found

    def __getitem__(self, kind: str) -> slice:
        """The last unbroken run of a kind: a clip, the question, the answer."""
        columns = self.columns(kind)
        first = len(columns) - 1
        while first and columns[first - 1] == columns[first] - 1:
            first -= 1
        return slice(columns[first], columns[-1] + 1)

    def seconds(self, column: int) -> tuple[int, float, float]:
        """(clip, from, to) of the audio token at a position, in seconds within its clip."""
        kind = self.kinds[column]
        if not is_audio(kind):
            raise InputError(f"position {column} is {kind}, no audio token")
        nth = column - self[kind].start
        return int(kind[6:]), nth * SECONDS_PER_TOKEN, (nth + 1) * SECONDS_PER_TOKEN


def is_audio(kind: str) -> bool:
    """Whether it is the kind of a clip's tokens."""
    return kind.startswith("audio ")
