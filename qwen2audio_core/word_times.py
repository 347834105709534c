"""When each word of a transcript was said, read from the attention that wrote it.

Some heads of the language model look at the place in the clip that they are writing down, so that
their attention, answer tokens against audio tokens, shows a rising path:

    r[k, a]       attention of token k to the clip's place a, each row to sum 1: mean of the heads
                  whose own path is clearest
    w[k, a]       log(0.7 A r + 0.3) - (t_a - u_k)^2 / (2 sigma^2)
    path          of the largest sum of w from the first token and place to the last

u_k is where token k would lie if letters were spread evenly over what is not silent: a model that
attends sharply overrules it, one that does not falls back to it. The way by a path through
attention is Whisper's (its published timing code), where the heads come from a list; here each
clip chooses its own.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2audio_core.chat import Batch
from qwen2audio_core.errors import InputError
from qwen2audio_core.frontend import SAMPLE_RATE, SECONDS_PER_TOKEN
from qwen2audio_core.model import Qwen2Audio
from qwen2audio_core.probe import hooks, run
from qwen2audio_core.tokenizer import Tokenizer

HEADS = 4  # whose attention is averaged, out of all
FLAT = 0.3  # of each row of attention is taken for noise
SIGMA = 0.3  # s, how far a word may easily lie from an even spread of the letters
QUIET = 10 ** (-35 / 20)  # of the loudest 10 ms of the clip: what is softer is a pause
UNSPACED = (  # [first, end) of the scripts written without spaces
    (0x0E00, 0x10A0),  # Thai, Lao, Tibetan, Burmese
    (0x1780, 0x1800),  # Khmer
    (0x3040, 0xA000),  # Kana, Han
    (0xF900, 0xFB00),
    (0xFF66, 0xFFA0),  # Kana of half width
    (0x20000, 0x40000),
)


@dataclass(frozen=True)
class Word:
    """A word and when it was said, in seconds from the beginning of the clip. None begins before
    the one in front of it has ended."""

    text: str
    start: float
    end: float
    probability: float  # mean of its tokens', as the model gave them


class Path(NamedTuple):
    """The audio tokens that each answer token was written from."""

    first: list[int]
    last: list[int]  # inclusive; several answer tokens may share one
    heads: list[tuple[int, int]]  # (layer, head) that were read


def word_times(
    model: Qwen2Audio,
    tokenizer: Tokenizer,
    batch: Batch,
    answer: Sequence[int],
    waveform: Tensor | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
) -> list[Word]:
    """The words of one answer to one clip.

    batch     prompt and answer in one row (attribution.answered), with one clip
    answer    the answer's ids, the last ones of the row; special tokens among them are no words
    waveform  (N,) the clip at 16 kHz, for its pauses; None takes it for one without
    heads     (layer, head) to read; None for the clearest
    """
    columns = range(batch.ids.shape[1] - len(answer), batch.ids.shape[1])
    if batch.ids[0, columns.start :].tolist() != list(answer):
        raise InputError("the batch must be one row that ends in the answer")
    places = [i for i, token in enumerate(answer) if tokenizer.bytes_of(token)]
    if not places:
        return []
    sizes = [len(tokenizer.bytes_of(answer[i]).strip()) for i in places]
    path, chances = align(model, batch, [columns[i] for i in places], sizes, waveform, heads)
    found = split_words([answer[i] for i in places], tokenizer)
    loud = None if waveform is None else loud_frames(waveform)
    words: list[Word] = []
    for (text, tokens), (start, end) in zip(
        found, _spans(path, [own for _, own in found]), strict=True
    ):
        start, end = start * SECONDS_PER_TOKEN, end * SECONDS_PER_TOKEN
        if loud is not None:
            start, end = _without_pauses(loud, start, end)
        start = max(start, words[-1].end if words else 0.0)
        chance = sum(chances[i] for i in tokens) / len(tokens)
        words.append(Word(text, round(start, 3), round(max(start, end), 3), round(chance, 4)))
    return words


def _spans(path: Path, words: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Where each word begins and ends, in places: (first, behind the last).

    words  the tokens of each. Tokens that share a place, and words that share a token, have equal
           parts of it
    """
    tokens = _in_parts(list(zip(path.first, path.last, strict=True)))
    owned = _in_parts([(own[0], own[-1]) for own in words])

    def place(at: float) -> float:
        """Of a point among the tokens, such as the middle of one."""
        token = min(int(at), len(tokens) - 1)
        start, end = tokens[token]
        return start + (at - token) * (end - start)

    return [(place(start), place(end)) for start, end in owned]


def _in_parts(spans: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """Inclusive spans (first, last) of whole numbers, in order, to (begin, end) such that those
    that share a number have equal parts of it."""
    sharing: dict[int, list[int]] = {}
    for number, span in enumerate(spans):
        for at in set(span):
            sharing.setdefault(at, []).append(number)
    return [
        (
            first + sharing[first].index(number) / len(sharing[first]),
            last + (sharing[last].index(number) + 1) / len(sharing[last]),
        )
        for number, (first, last) in enumerate(spans)
    ]


def align(
    model: Qwen2Audio,
    batch: Batch,
    tokens: Sequence[int],
    sizes: Sequence[int] | None = None,
    waveform: Tensor | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
) -> tuple[Path, list[float]]:
    """The path of chosen positions through the clip, and each one's probability.

    sizes   of the tokens, in letters, for their even spread; None takes them for equal
    Only the chosen heads' rows are kept, a layer at a time. InputError where there is no one clip.
    """
    audio = (batch.ids[0] == model.config.audio_token_id).nonzero()[:, 0]
    if len(batch.ids) != 1 or batch.mel is None or len(batch.mel) != 1:
        raise InputError("words are timed in one conversation with one clip")
    readers = torch.tensor(list(tokens), device=batch.ids.device) - 1  # they wrote the tokens
    even = spread(sizes or [1] * len(tokens), len(audio), waveform)
    kept: list[tuple[float, tuple[int, int], Tensor]] = []

    def read(weights: Tensor, layer: int) -> None:
        rows = weights[0][:, readers][:, :, audio].float().cpu()  # (H, K, A)
        rows = rows / rows.sum(-1, keepdim=True).clamp(min=1e-9)
        scores = best_path(evidence(rows) + even)[1]
        for head, score in enumerate(scores.tolist()):
            if heads is None or (layer, head) in heads:
                kept.append((score, (layer, head), rows[head]))
        if heads is None:
            kept.sort(key=lambda one: -one[0])
            del kept[HEADS:]

    with (
        torch.inference_mode(),
        hooks(model, {"blocks.*.attn.hook_pattern": lambda x, point: read(x, point.layer() or 0)}),
    ):
        logits = run(model, batch)[0, readers].float().softmax(-1)
    if not kept:
        raise InputError(f"the model has none of the heads {list(heads or ())}")
    chances = logits.gather(-1, batch.ids[0, readers + 1, None])[:, 0].tolist()
    mean = torch.stack([one[2] for one in kept]).mean(0, keepdim=True)
    spans = best_path(evidence(mean) + even)[0][0]
    first, last = spans[:, 0].tolist(), spans[:, 1].tolist()
    return Path(first, last, [one[1] for one in kept]), chances


def evidence(rows: Tensor) -> Tensor:
    """Rows of attention (..., K, A) that sum to 1, to log-odds against looking anywhere."""
    padded = torch.nn.functional.pad(rows.flatten(0, -2)[None], (1, 1), mode="replicate")[0]
    smooth = padded.unfold(-1, 3, 1).mean(-1).view_as(rows)
    return ((1 - FLAT) * rows.shape[-1] * smooth + FLAT).log()


def spread(sizes: Sequence[int], places: int, waveform: Tensor | None = None) -> Tensor:
    """(K, A): how far each place is from where a token of an even spread lies, as a penalty."""
    loud = torch.ones(4 * places) if waveform is None else loud_frames(waveform).float()
    heard = loud.cumsum(0) / loud.sum()
    letters = torch.tensor(sizes).clamp(min=1).float()
    middles = (letters.cumsum(0) - letters / 2) / letters.sum()
    seconds = torch.searchsorted(heard, middles) * 0.01
    at = (torch.arange(places) + 0.5) * SECONDS_PER_TOKEN
    return -((at - seconds[:, None]) ** 2) / (2 * SIGMA**2)


def best_path(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The path from the first token and place to the last that gathers most and never goes back.

        D[k, a] = w[k, a] + max(D[k, a-1], D[k-1, a-1], D[k-1, a])

    weights   (H, K, A)
    returns   spans (H, K, 2), first and last place of each token, inclusive; sums (H,)
    A row is one running maximum: with S[a] the sum of w[k] up to a,
    D[k, a] = S[a] + max over b <= a of (enter[b] - S[b-1]).
    """
    heads, count, places = weights.shape
    infinite = weights.new_full((heads, 1), float("-inf"))
    begun = []  # where the token's part of the path begins, for each place where it may end
    above = torch.cat((weights.new_zeros(heads, 1), infinite.expand(-1, places - 1)), 1)
    for k in range(count):
        sums = weights[:, k].cumsum(-1)
        before = torch.cat((weights.new_zeros(heads, 1), sums[:, :-1]), 1)
        diagonal = torch.cat((infinite, above[:, :-1]), 1)
        enter = torch.maximum(above, diagonal) if k else above
        best, begin = (enter - before).cummax(-1)
        begun.append((begin, diagonal > above if k else torch.zeros_like(begin, dtype=torch.bool)))
        above = sums + best
    spans = torch.empty(heads, count, 2, dtype=torch.long, device=weights.device)
    at = torch.full((heads, 1), places - 1, device=weights.device)
    for k in reversed(range(count)):
        begin, slanted = begun[k]
        first = begin.gather(1, at)
        spans[:, k, 0], spans[:, k, 1] = first[:, 0], at[:, 0]
        at = first - slanted.gather(1, first).long()
    return spans, above[:, -1]


def split_words(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """(word, which of the ids wrote it): runs without spaces, or single characters of scripts that
    are written without them. Signs belong to the word they touch, those that open something to the
    one behind them, and such as stand alone to the one before."""
    owners: list[int] = []  # of each byte
    content = b""
    for number, token in enumerate(ids):
        piece = tokenizer.bytes_of(token)
        content += piece
        owners += [number] * len(piece)
    words: list[tuple[str, list[int]]] = []
    opening, held = "", list[int]()  # signs that wait for their word, and their tokens
    touches = False  # nothing stands between the last word and here
    joins = False  # a letter here goes on with the last word
    at = 0
    for letter in content.decode("utf-8", "surrogateescape"):
        size = len(letter.encode("utf-8", "surrogateescape"))
        tokens, at = owners[at : at + size], at + size
        if letter.isspace():
            if opening and words:  # they were alone
                words[-1] = (f"{words[-1][0]} {opening}", words[-1][1])
                opening, held = "", []
            elif opening:
                opening = opening.rstrip() + " "
            touches = joins = False
            continue
        kind, alone = unicodedata.category(letter), is_unspaced(letter)
        if kind[0] in "PS":
            # A sign's own token says when it was written, not when a word was said.
            if touches and not opening and (joins or kind not in ("Ps", "Pi")):
                words[-1] = (words[-1][0] + letter, words[-1][1])
            else:
                opening, held = opening + letter, held + tokens
            continue
        if joins and not alone and not opening:
            words[-1] = (words[-1][0] + letter, words[-1][1] + tokens)
        else:
            words.append((opening + letter, tokens))
            opening, held = "", []
        touches, joins = True, not alone
    if opening and words:
        words[-1] = (f"{words[-1][0]} {opening}", words[-1][1])
    elif opening:
        words.append((opening.rstrip(), held))
    return [
        (text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), sorted(set(tokens)))
        for text, tokens in words
    ]


def is_unspaced(letter: str) -> bool:
    """Whether it belongs to a script written without spaces: Han, Kana, Thai and their kin."""
    code = ord(letter) if letter else 0
    return any(first <= code < end for first, end in UNSPACED)


def loud_frames(waveform: Tensor) -> Tensor:
    """Which 10 ms of a clip are no pause: louder than QUIET, and than twice its steady noise."""
    hop = SAMPLE_RATE // 100
    frames = waveform[: len(waveform) // hop * hop].view(-1, hop).square().mean(-1).sqrt()
    most = frames.max()
    noise = (2 * frames.quantile(0.1)).clamp(max=most / 4)
    return frames >= torch.maximum(QUIET * most, noise)


def _without_pauses(loud: Tensor, start: float, end: float) -> tuple[float, float]:
    """The part of a span that is no pause, to 10 ms; all of it where everything is."""
    first = min(round(start * 100), len(loud) - 1)
    inside = loud[first : max(first + 1, round(end * 100))].nonzero()[:, 0]
    if not len(inside):
        return start, end
    return (first + int(inside[0])) / 100, (first + int(inside[-1]) + 1) / 100
