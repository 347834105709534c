"""How right answers are: error rates, BLEU and accuracy, each with what chance makes of it.

An interval is a bootstrap: the rows are drawn anew, with replacement, 1,000 times, and it holds the
middle 95 % of what comes out. It says how much another draw of such rows would change a score.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen2audio_core import install
from qwen2audio_core.errors import InputError

DRAWS = 1000


@dataclass(frozen=True)
class Score:
    """value, low and high are parts of 1 (an error rate may be above it), of BLEU points of 100."""

    metric: str  # "WER", "CER", "BLEU" or "accuracy"
    value: float
    low: float
    high: float
    rows: int
    detail: str  # what was counted, or sacreBLEU's signature
    wrong: Sequence[int] = field(default=(), repr=False)  # in each row; empty for BLEU

    def __str__(self) -> str:
        shown = (100 * x if self.metric != "BLEU" else x for x in (self.value, self.low, self.high))
        unit = "" if self.metric == "BLEU" else " %"
        value, low, high = (f"{x:.2f}" for x in shown)
        interval = f" ({low} to {high})" if self.rows > 1 else ""
        rows = f"{self.rows:,} row{'s' * (self.rows > 1)}"
        return f"{self.metric} {value}{unit}{interval}, {rows}, {self.detail}"


def error_rate(
    expected: Sequence[Sequence[str]], given: Sequence[Sequence[str]], metric: str = "WER"
) -> Score:
    """Words or characters that are wrong, left out and too many, over those expected, all together.

    expected, given  the items of each row, from normalize.items
    metric           its name
    errors           InputError where no item is expected; where jiwer is not installed
    """
    try:
        import jiwer
    except ImportError as error:
        raise _missing() from error
    lengths = np.array([len(row) for row in expected])
    if not lengths.sum():
        raise InputError("not scored: no expected answer has a word")
    pairs = [" ".join(row) for row in expected], [" ".join(row) for row in given]
    found = jiwer.process_words(*pairs)
    edits = np.array([sum(map(_edits, chunks)) for chunks in found.alignments])
    detail = (
        f"{found.substitutions:,} wrong, {found.deletions:,} left out, {found.insertions:,} too"
        f" many of {lengths.sum():,}"
    )
    return _ratio(metric, edits, lengths, detail, edits)


def accuracy(expected: Sequence[str], given: Sequence[str]) -> Score:
    """The part of the answers that are the expected ones to the letter, but for spaces around."""
    right = np.array([a.strip() == b.strip() for a, b in zip(expected, given, strict=True)], int)
    detail = f"{right.sum():,} of {len(right):,} right"
    return _ratio("accuracy", right, np.ones_like(right), detail, 1 - right)


def bleu(expected: Sequence[str], given: Sequence[str], language: str) -> Score:
    """sacreBLEU's, with the tokenizer for the language that is translated into.

    errors  InputError where sacreBLEU, or what it needs for Japanese, is not installed
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise _missing() from error
    own = {"zh": "zh", "ja": "ja-mecab"}
    try:
        metric = BLEU(tokenize=own.get(language, "13a"))
    except (ImportError, RuntimeError) as error:
        line = install.package("sacrebleu[ja]")
        raise InputError(f"BLEU of Japanese needs MeCab, which is missing: {line}") from error
    texts = list(given), [list(expected)]
    found = metric.corpus_score(*texts)
    signature = str(metric.get_signature())
    low = high = found.score
    if len(given) > 1:
        again = metric.corpus_score(*texts, n_bootstrap=DRAWS)
        low, high = again._mean - again._ci, again._mean + again._ci
    return Score("BLEU", found.score, low, high, len(given), signature)


def _edits(chunk: object) -> int:
    """How many edits one piece of an alignment stands for."""
    kind, reference, hypothesis = (
        chunk.type,  # type: ignore[attr-defined]
        chunk.ref_end_idx - chunk.ref_start_idx,  # type: ignore[attr-defined]
        chunk.hyp_end_idx - chunk.hyp_start_idx,  # type: ignore[attr-defined]
    )
    return 0 if kind == "equal" else max(reference, hypothesis)


def _ratio(
    metric: str, counts: np.ndarray, sizes: np.ndarray, detail: str, wrong: np.ndarray
) -> Score:
    draw, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        rows = draw.integers(0, len(counts), len(counts))
        if size := sizes[rows].sum():
            found.append(counts[rows].sum() / size)
    low, high = np.quantile(found, (0.025, 0.975))
    value = counts.sum() / sizes.sum()
    interval = float(low), float(high)
    return Score(metric, float(value), *interval, len(counts), detail, wrong.tolist())


def _missing() -> InputError:
    return InputError(f"scores need packages that are not installed: {install.extra('eval')}")
