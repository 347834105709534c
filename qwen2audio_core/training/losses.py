"""What is minimised: pure functions of hidden states and labels, sums and not means.

A step may consist of several batches, on several machines. Each contributes a sum, and all are
divided by one count of the whole step, so that every token (or every row, see `row_means`) weighs
the same wherever it lies.
"""

from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label of a position that is not trained on


def supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a label, and these labels.

    hidden   (B, T, D)  hidden[:, t] predicts labels[:, t + 1]
    labels   (B, T)     the ids themselves, IGNORE where nothing is trained
    returns  (P, D), (P,)  so that the output head, the widest matrix there is, runs on P positions
    """
    wanted = labels[:, 1:] != IGNORE
    return hidden[:, :-1][wanted], labels[:, 1:][wanted]


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods, -log softmax(logits)[label], in float32 or wider.

    logits  (P, V), labels (P,); returns ()
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, reduction="sum")


def row_log_probs(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """log p(answer | prompt) of each row: the sum over its labels, in float32 or wider.

    logits  (P, V), labels (P,)  of the positions that `supervised` gathered
    wanted  (B, T)  bool, where in the batch they lie
    returns (B,)
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = -F.cross_entropy(wide, labels, reduction="none")
    rows = wanted.nonzero()[:, 0]
    return torch.zeros(len(wanted), dtype=each.dtype, device=each.device).index_add(0, rows, each)


def row_means(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Sum over rows of the mean negative log-likelihood of each: a short answer weighs as much as a
    long one. Arguments as in `row_log_probs`; returns ()."""
    tokens = wanted.sum(-1).clamp(min=1)  # of a row without a label the sum is 0
    return -(row_log_probs(logits, labels, wanted) / tokens).sum()


class Preference(NamedTuple):
    """Sums over pairs."""

    loss: Tensor
    won: Tensor  # pairs where the better answer gained more than the worse one
    margin: Tensor  # of the rewards, beta * (log p - log p of the reference)


def dpo(policy: Tensor, reference: Tensor, beta: float) -> Preference:
    """Direct preference optimisation, the sigmoid loss:

        -log sigmoid(beta * ((p_better - r_better) - (p_worse - r_worse)))

    policy, reference  (2N,)  log p of N better answers, then of the N worse ones, in nats
    beta               how dear it is to leave the reference; 0.1 is common
    Rafailov et al., arXiv 2305.18290, equation 7.
    """
    better, worse = (policy - reference).chunk(2)
    margin = beta * (better - worse)
    return Preference(-F.logsigmoid(margin).sum(), (margin > 0).sum(), margin.detach().sum())


def frames(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods of each frame's class, and how many are its likeliest.

    logits (P, K), labels (P,)
    """
    return next_token(logits, labels), (logits.argmax(-1) == labels).sum()


def attended(q: Tensor, k: Tensor, heard: Tensor) -> Tensor:
    """Guided attention: -log of the attention that falls where a token is said, summed over tokens
    and averaged over heads.

    q, k   (B, T, H, C)  queries and keys, rotated, of the heads that are guided
    heard  (P, 4)  row, position of the token, which the position before predicts, and the first
           and the last + 1 of the keys where it is said; the tokens of a row together
    returns ()
    After Tachibana et al., arXiv 1710.08969, which guides by a diagonal instead of known times.
    """
    kind = torch.promote_types(q.dtype, torch.float32)
    keys = torch.arange(k.shape[1], device=k.device)
    total = q.new_zeros((), dtype=kind)
    with torch.autocast(q.device.type, enabled=False):  # which would round the products
        counts = Counter(heard[:, 0].tolist())
        for row, those in zip(counts, heard.split(list(counts.values())), strict=True):
            _, position, low, high = those.unbind(1)
            query = q[row, position - 1].to(kind) * q.shape[-1] ** -0.5  # (P, H, C)
            scores = torch.einsum("phc,shc->phs", query, k[row].to(kind))
            scores = scores.masked_fill((keys >= position[:, None])[:, None], float("-inf"))
            inside = ((keys >= low[:, None]) & (keys < high[:, None]))[:, None]
            there = scores.masked_fill(~inside, float("-inf")).logsumexp(-1)
            total = total + (scores.logsumexp(-1) - there).mean(1).sum()
    return total


def ctc(logits: Tensor, frames: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Connectionist temporal classification: sum over clips of -log p(text | frames) / characters.

    logits   (n, T, K)  class 0 is the blank
    frames   (n,)       valid frames of each clip
    targets  (n, S)     classes 1 .. K - 1, padded with anything behind `lengths`
    lengths  (n,)       characters of each text
    returns  ()         clips whose text cannot fit into their frames count as zero
    Graves et al., ICML 2006.
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # (T, n, K)
    if log_probs.device.type == "mps":  # which PyTorch has no such loss for
        log_probs, targets = log_probs.cpu(), targets.cpu()
        frames, lengths = frames.cpu(), lengths.cpu()
    each = F.ctc_loss(log_probs, targets, frames, lengths, reduction="none", zero_infinity=True)
    return (each / lengths.clamp(min=1)).sum().to(logits.device)
