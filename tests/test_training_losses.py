"""Each loss against its closed form in float64, and against a definition that is written out."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from qwen2audio_core import ops
from qwen2audio_core.training import losses
from qwen2audio_core.training.losses import IGNORE


def test_next_token_is_the_sum_of_surprises() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]], dtype=torch.float64)
    # probabilities 1/4, 3/4 and 4/5, 1/5
    found = losses.next_token(logits, torch.tensor([1, 1]))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 5), abs=1e-12)


def test_supervised_gathers_what_predicts_each_label() -> None:
    hidden = torch.arange(2 * 4 * 3, dtype=torch.float64).view(2, 4, 3)
    labels = torch.tensor([[5, IGNORE, 7, IGNORE], [IGNORE, IGNORE, IGNORE, 9]])
    x, wanted = losses.supervised(hidden, labels)
    # The first position has nothing before it that could predict it.
    assert wanted.tolist() == [7, 9]
    assert torch.equal(x, torch.stack((hidden[0, 1], hidden[1, 2])))


def test_gathering_first_changes_neither_loss_nor_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7)).masked_fill(torch.rand(3, 7) < 0.5, IGNORE)
    everywhere = ops.cross_entropy(hidden[:, :-1].flatten(0, 1), head, labels[:, 1:].flatten())
    x, wanted = losses.supervised(hidden, labels)
    gathered = losses.next_token(F.linear(x, head), wanted) / len(wanted)
    assert gathered.item() == pytest.approx(everywhere.item(), abs=1e-12)
    for a, b in zip(
        torch.autograd.grad(gathered, (hidden, head)),
        torch.autograd.grad(everywhere, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_batches_of_unequal_size_sum_to_the_mean_over_all_tokens() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 5, dtype=torch.float64), torch.randint(0, 5, (10,))
    whole = F.cross_entropy(logits, labels)
    parts = sum(losses.next_token(logits[a:b], labels[a:b]) for a, b in ((0, 1), (1, 10)))
    assert (parts / 10).item() == pytest.approx(whole.item(), abs=1e-12)
    means = sum(F.cross_entropy(logits[a:b], labels[a:b]) for a, b in ((0, 1), (1, 10))) / 2
    assert abs(means.item() - whole.item()) > 1e-3  # what a mean of means would give


def test_row_means_weigh_a_short_answer_as_much_as_a_long_one() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (3, 6))
    wanted = torch.zeros(3, 6, dtype=torch.bool)
    wanted[0, 4:], wanted[2, 1:] = True, True  # two tokens, none, five
    found = losses.row_means(logits[wanted], labels[wanted], wanted)
    each = [F.cross_entropy(logits[i][wanted[i]], labels[i][wanted[i]]) for i in (0, 2)]
    assert found.item() == pytest.approx(sum(each).item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(found, logits)
    (expected,) = torch.autograd.grad(sum(each), logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    tokens = losses.next_token(logits[wanted], labels[wanted])
    assert abs(tokens.item() / 7 - found.item() / 2) > 1e-3  # the control


def test_ctc_is_the_sum_over_all_alignments() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, dtype=torch.float64)
    texts, frames = [[1, 2], [2, 2]], [4, 3]
    expected = 0.0
    for clip, (text, count) in enumerate(zip(texts, frames, strict=True)):
        log_probs = logits[clip].log_softmax(-1)
        total = 0.0
        for path in itertools.product(range(3), repeat=count):
            merged = [c for c, _ in itertools.groupby(path) if c != 0]
            if merged == text:
                total += math.exp(sum(log_probs[t, c].item() for t, c in enumerate(path)))
        expected += -math.log(total) / len(text)
    found = losses.ctc(logits, torch.tensor(frames), torch.tensor(texts), torch.tensor([2, 2]))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_a_text_that_cannot_fit_its_frames_counts_as_nothing() -> None:
    logits = torch.randn(1, 2, 3, requires_grad=True)
    found = losses.ctc(logits, torch.tensor([2]), torch.tensor([[1, 1]]), torch.tensor([2]))
    found.backward()
    assert found.item() == 0.0 and not logits.grad.any()


def test_guided_attention_is_the_surprise_at_where_a_token_is_said() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 9, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    q.requires_grad_()
    heard = torch.tensor([[0, 6, 1, 3], [1, 8, 2, 5]])
    total = losses.attended(q, k, heard)
    expected = 0.0
    for row, position, low, high in heard.tolist():
        for head in range(3):
            scores = q[row, position - 1, head] @ k[row, :position, head].T / 8**0.5
            expected += -scores.softmax(0)[low:high].sum().log() / 3
    torch.testing.assert_close(total, expected)
    with torch.autocast("cpu", torch.bfloat16):  # as in training: no product is rounded
        assert torch.equal(losses.attended(q, k, heard), total)
    total.backward()
    touched = q.grad.abs().sum((2, 3)).nonzero().tolist()
    assert touched == [[0, 5], [1, 7]]  # the positions that predict the tokens, and no other
