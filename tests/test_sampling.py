"""Every rule of sampling.py against its definition, and against transformers' processors."""

import math

import pytest
import torch

from qwen2audio_core.errors import CheckpointError, InputError
from qwen2audio_core.sampling import (
    Settings,
    choose,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    penalise_repetition,
)

INF = float("inf")
GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(3, 1000, generator=GENERATOR) * 4
HISTORY = torch.randint(0, 1000, (3, 50), generator=GENERATOR)


@pytest.fixture(scope="module")
def processors():
    return pytest.importorskip("transformers.generation.logits_process")


def test_penalty_by_hand():
    scores = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    history = torch.tensor([[0, 0, 1]])  # an id that occurs twice is penalised once
    expected = torch.tensor([[2.0 / 1.1, -2.0 * 1.1, 1.0, -1.0]])
    torch.testing.assert_close(penalise_repetition(scores, history, 1.1), expected)


def test_penalty(processors):
    reference = processors.RepetitionPenaltyLogitsProcessor(1.1)(HISTORY, SCORES.clone())
    assert torch.equal(penalise_repetition(SCORES, HISTORY, 1.1), reference)


@pytest.mark.parametrize("k", [1, 20, 1000, 5000])
def test_top_k(processors, k):
    reference = processors.TopKLogitsWarper(k)(HISTORY, SCORES.clone())
    assert torch.equal(keep_top_k(SCORES, k), reference)


def test_top_k_keeps_ties():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    assert keep_top_k(scores, 2).tolist() == [[3.0, -INF, 2.0, 2.0]]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p(processors, p):
    reference = processors.TopPLogitsWarper(p)(HISTORY, SCORES.clone())
    assert torch.equal(keep_top_p(SCORES, p), reference)


def test_top_p_by_hand():
    scores = torch.tensor([[0.1, 0.6, 0.3]]).log()
    assert keep_top_p(scores, 0.5)[0].exp().tolist() == pytest.approx([0, 0.6, 0])
    assert keep_top_p(scores, 0.7)[0].exp().tolist() == pytest.approx([0, 0.6, 0.3])
    assert keep_top_p(scores, 1e-9)[0].exp().tolist() == pytest.approx([0, 0.6, 0])


def test_top_p_behind_top_k(processors):
    reference = processors.TopKLogitsWarper(20)(HISTORY, SCORES.clone())
    reference = processors.TopPLogitsWarper(0.5)(HISTORY, reference)
    assert torch.equal(keep_top_p(keep_top_k(SCORES, 20), 0.5), reference)


def test_the_order_and_the_random_numbers_of_the_reference(processors):
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(1.3),
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(40),
        processors.TopPLogitsWarper(0.8),
    ]
    settings = Settings(
        do_sample=True, temperature=0.7, top_k=40, top_p=0.8, repetition_penalty=1.3
    )
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for _ in range(50):
        scores = SCORES.clone()
        for processor in chain:
            scores = processor(HISTORY, scores)
        expected = torch.multinomial(scores.softmax(-1), 1, generator=theirs)[:, 0]
        assert torch.equal(choose(SCORES, HISTORY, 0, settings, ours), expected)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().expand(20000, -1)
    settings = Settings(do_sample=True)
    drawn = choose(logits, torch.zeros(20000, 1).long(), 0, settings, GENERATOR)
    shares = torch.bincount(drawn, minlength=4) / 20000
    assert (shares - logits[0].exp()).abs().max() < 4 * math.sqrt(0.25 / 20000)


def test_greedy_keeps_the_penalty():
    logits = torch.tensor([[2.0, 1.9]])
    history = torch.tensor([[0]])
    assert choose(logits, history, 0, Settings()).tolist() == [0]
    assert choose(logits, history, 0, Settings(repetition_penalty=1.1)).tolist() == [1]


def test_no_end_before_the_minimum():
    logits = torch.tensor([[1.0, 5.0, 4.0, 2.0]])
    settings = Settings(min_new_tokens=2, eos_token_ids=(1, 2))
    chosen = [choose(logits, torch.zeros(1, 1).long(), n, settings).item() for n in range(3)]
    assert chosen == [3, 3, 1]
    endless = Settings(min_new_tokens=2, eos_token_ids=())
    assert choose(logits, torch.zeros(1, 1).long(), 0, endless).item() == 1


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("draws", [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.5}])
def test_no_token_out_of_logits_that_are_not_finite(value, draws):
    logits = torch.zeros(2, 9)
    choose(logits, torch.zeros(2, 1).long(), 0, Settings(**draws))
    logits[1, 3] = value
    with pytest.raises(CheckpointError, match="not finite"):
        choose(logits, torch.zeros(2, 1).long(), 0, Settings(**draws))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities(dtype):
    scores, tokens = SCORES.to(dtype), torch.tensor([7, 0, 999])
    wide = scores.double().log_softmax(-1)
    chosen, highest, ids = log_probabilities(scores, tokens, 5)
    assert chosen.dtype == highest.dtype == torch.float32
    torch.testing.assert_close(chosen.double(), wide[torch.arange(3), tokens], rtol=0, atol=1e-5)
    torch.testing.assert_close(highest.double(), wide.topk(5).values, rtol=0, atol=1e-5)
    assert torch.equal(highest, log_probabilities(scores, ids[:, 4], 5)[1])
    torch.testing.assert_close(wide.gather(1, ids), highest.double(), rtol=0, atol=1e-5)
    assert log_probabilities(scores, tokens, 0)[1].shape == (3, 0)
    shut = scores.clone()
    shut[:, 1:] = -INF
    chosen, highest, _ = log_probabilities(shut, tokens, 2)
    assert chosen.tolist() == [-INF, 0, -INF] and highest.tolist() == [[0, -INF]] * 3


def test_half_precision_logits_are_compared_in_float32():
    logits = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)  # one step apart
    assert choose(logits, torch.tensor([[1]]), 0, Settings(repetition_penalty=1.001)).item() == 1
    assert choose(logits, torch.tensor([[1]]), 0, Settings(repetition_penalty=1.01)).item() == 0


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-42),
        ("temperature", 1e-42),
        ("temperature", "0.7"),
        ("top_k", 2.5),
        ("max_new_tokens", 2.5),
    ],
)
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(InputError, match=f"{field} is {value!r}, it must be"):
        Settings(**{field: value})
