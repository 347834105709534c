"""Sampling on the device against the plain functions of sampling.py."""

import pytest
import torch
from interpreter import DEVICE
from tolerance import DTYPES, poison
from torch import Tensor

import qwen2audio_kernels as kernels
from qwen2audio_core import sampling


def draw(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def sample(
    logits: Tensor,
    uniform: Tensor | float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    def full(value: float) -> Tensor:
        return torch.full((len(logits),), value, device=DEVICE)

    uniform = uniform if isinstance(uniform, Tensor) else full(uniform)
    settings = (full(temperature), full(top_k).int(), full(top_p), full(penalty))
    with poison():
        return kernels.sample(logits, uniform, *settings, seen)


def plain(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Probabilities of one row, from sampling.py."""
    scores = logits[None].float()
    if seen is not None:
        scores = sampling.penalise_repetition(scores, seen.nonzero().T, penalty)
    scores = scores / temperature
    if top_k:
        scores = sampling.keep_top_k(scores, top_k)
    if top_p < 1:
        scores = sampling.keep_top_p(scores, top_p)
    return scores.softmax(-1)[0]


SETTINGS = {
    "all": {},
    "published": {"temperature": 0.7, "top_k": 20, "top_p": 0.5, "penalty": 1.1},
    "top-k": {"top_k": 7},
    "top-k of one": {"top_k": 1, "temperature": 2.0},
    "top-k beyond the vocabulary": {"top_k": 10_000},
    "top-p": {"top_p": 0.8, "temperature": 1.3},
    "tiny top-p": {"top_p": 1e-6},
    "penalty": {"penalty": 1.7, "top_k": 30},
}


CASES = [(name, torch.float32) for name in SETTINGS]
CASES += [("published", torch.float16), ("published", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_token_has_its_share_of_the_unit_interval(name: str, dtype: torch.dtype) -> None:
    # With evenly spaced "random" numbers the draws are the distribution itself, up to one draw at
    # either end of a token's interval: sharper than a chi-square test, and never flaky.
    settings, V, draws = SETTINGS[name], 700, 8
    logits = draw(V).to(dtype)
    logits[5] = float("-inf")
    seen = torch.zeros(V, dtype=torch.bool, device=DEVICE)
    seen[::3] = True
    seen = seen if "penalty" in settings else None
    uniform = ((torch.arange(draws) + 0.5) / draws).to(DEVICE)
    tokens = sample(
        logits.expand(draws, V),
        uniform,
        **settings,
        seen=None if seen is None else seen.expand(draws, V),
    )
    expected = plain(logits, **settings, seen=seen)
    assert (expected[tokens] > 0).all()
    shares = torch.bincount(tokens, minlength=V) / draws
    assert (shares - expected).abs().max() <= 1 / draws + 1e-5
    assert tokens.equal(torch.searchsorted(expected.cumsum(0), uniform, right=True))


def scattered(V: int) -> Tensor:
    """Every part of the row has some of the highest scores."""
    return draw(V, seed=8)


def in_one_place(V: int) -> Tensor:
    """All high scores side by side."""
    x = draw(V, seed=9, spread=0.5)
    x[800:840] += 9.0
    return x


def few(V: int) -> Tensor:
    """Whole stretches that cannot be drawn; six ids are left."""
    x = torch.full((V,), float("-inf"), device=DEVICE)
    x[[3, 256, 511, 512, 2000, 2799]] = torch.tensor([1.0, 3.0, 2.0, 0.0, 2.5, 1.5], device=DEVICE)
    return x


def alike(V: int) -> Tensor:
    """Three values only: ties within and between parts, at every rank."""
    return torch.arange(V, device=DEVICE).float() % 3


def one_each(V: int) -> Tensor:
    """One high score in each chunk, no two the same."""
    x = draw(V, seed=10, spread=0.1)
    x[120::256] += 3.0 + torch.arange(11, device=DEVICE) / 4
    return x


@pytest.mark.parametrize("row", [scattered, in_one_place, few, alike, one_each])
@pytest.mark.parametrize("top_k", [1, 6, 11, 12])
def test_top_k_wherever_the_highest_are(row, top_k: int) -> None:
    """The interpreter has eleven chunks here: k below, at and above their number."""
    V, draws = 2800, 3
    logits = row(V)
    uniform = ((torch.arange(draws) + 0.5) / draws).to(DEVICE)
    for top_p in (1.0, 0.6):
        if row is alike and top_p < 1:
            continue  # which of equal logits top-p cuts is not the plain version's choice
        tokens = sample(logits.expand(draws, V), uniform, top_k=top_k, top_p=top_p)
        expected = plain(logits, top_k=top_k, top_p=top_p)
        assert tokens.equal(torch.searchsorted(expected.cumsum(0), uniform, right=True))


def test_chi_square() -> None:
    settings = {"temperature": 0.8, "top_k": 6, "top_p": 0.8}
    logits, draws = draw(40, seed=3, spread=1.0), 100
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    counts = torch.bincount(sample(logits.expand(draws, -1), uniform, **settings), minlength=40)
    expected = plain(logits, **settings) * draws
    kept = expected > 0
    assert not counts[~kept].any()
    assert kept.sum() == 5 and expected[kept].min() > 5
    statistic = ((counts - expected)[kept].square() / expected[kept]).sum()
    assert statistic < 18.47  # chi-square with 4 degrees of freedom exceeds it once in 1,000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 63, 512, 1409])
def test_greedy(V: int, dtype: torch.dtype) -> None:
    logits = draw(4, V).to(dtype)
    assert torch.equal(sample(logits, temperature=0.0), logits.float().argmax(-1))
    seen = torch.rand(4, V, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
    ours = sample(logits, temperature=0.0, top_k=1, top_p=0.1, penalty=1.9, seen=seen)
    for row in range(4):
        history = seen[row].nonzero().T
        scores = sampling.penalise_repetition(logits[row : row + 1].float(), history, 1.9)
        assert ours[row] == scores.argmax()


def test_greedy_is_choose() -> None:
    logits, history = draw(3, 300), torch.tensor([[1, 2, 2], [5, 0, 9], [7, 7, 7]], device=DEVICE)
    seen = torch.zeros(3, 300, dtype=torch.bool, device=DEVICE).scatter(1, history, True)
    settings = sampling.Settings(repetition_penalty=1.3)
    ours = sample(logits, temperature=0.0, penalty=1.3, seen=seen)
    assert torch.equal(ours, sampling.choose(logits, history, 0, settings))


def test_ties() -> None:
    logits = torch.zeros(1, 600, device=DEVICE)
    logits[0, [7, 300, 599]] = 2.0
    assert sample(logits, temperature=0.0).tolist() == [7]
    for uniform, token in ((0.0, 7), (0.5, 300), (0.9, 599)):
        assert sample(logits, uniform, top_k=1).tolist() == [token]  # all ties with the k-th stay
        assert sample(logits, uniform, top_p=1e-3).tolist() == [token]


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.5}])
def test_a_row_without_a_number_gets_an_id_of_the_vocabulary(value: float, settings: dict) -> None:
    logits = draw(2, 700)
    logits[1] = value
    tokens = sample(logits, 0.4, **settings)
    assert 0 <= int(tokens[1]) < 700
    assert tokens[0] == sample(logits[:1], 0.4, **settings)[0]


def test_the_ends_of_the_unit_interval() -> None:
    logits = draw(1, 1000, seed=2)
    logits[0, 0] = float("-inf")
    kept = plain(logits[0], top_p=0.9).nonzero()[:, 0]
    assert sample(logits, 0.0, top_p=0.9).item() == kept[0]
    assert sample(logits, 1 - 2**-24, top_p=0.9).item() == kept[-1]


def test_rows_have_their_own_settings_and_do_not_depend_on_the_batch() -> None:
    logits, uniform = draw(3, 2, 300)[:, 1], torch.tensor([0.3, 0.6, 0.9], device=DEVICE)
    settings = (
        torch.tensor([0.0, 1.0, 0.5], device=DEVICE),
        torch.tensor([0, 5, 40], device=DEVICE).int(),
        torch.tensor([1.0, 0.9, 0.7], device=DEVICE),
        torch.tensor([1.2, 1.0, 3.0], device=DEVICE),
    )
    seen = torch.arange(900, device=DEVICE).view(3, 300) % 2 == 0
    together = kernels.sample(logits, uniform, *settings, seen)
    for row in range(3):
        cut = slice(row, row + 1)
        alone = kernels.sample(logits[cut], uniform[cut], *(x[cut] for x in settings), seen[cut])
        assert torch.equal(together[cut], alone)


def test_errors() -> None:
    logits, ones = draw(2, 10), torch.ones(2, device=DEVICE)
    good = (ones, ones, ones.int(), ones, ones)
    calls = {
        "logits has shape": (logits[0], *good),
        "logits is float64": (logits.double(), *good),
        "uniform has shape": (logits, ones[:1], *good[1:]),
        "top_k is torch.float32": (logits, ones, ones, ones, ones, ones),
        "seen has shape": (logits, *good, logits[:, 1:] > 0),
        "seen is torch.float32": (logits, *good, logits),
    }
    for message, arguments in calls.items():
        with pytest.raises(ValueError, match=message):
            kernels.sample(*arguments)
