from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_engine import read, tiny_engine, tokens

from nearfar.config import EngineConfig, SamplingConfig, generator_seed
from nearfar.errors import InvalidOptionError
from nearfar.runtime.engine.sampling import Sampler, keep_top_p

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9, -4.0, 2.1, 0.0])
DRAWS = 8_000
# 0.999 quantile of chi-square with 7 degrees of freedom; the draws are the same in every run
CHI_SQUARE_7 = 24.32


def drawn(config: SamplingConfig, count: int = DRAWS) -> torch.Tensor:
    """How often each token came [V]."""
    sampler = Sampler(config)
    return torch.tensor([sampler.sample(LOGITS) for _ in range(count)]).bincount(minlength=8)


def test_zero_temperature_takes_the_most_likely() -> None:
    sampler = Sampler(SamplingConfig(temperature=0.0, top_p=0.1, seed=5))
    assert [sampler.sample(LOGITS) for _ in range(20)] == [6] * 20
    assert sampler.sample(torch.tensor([1.0, 3.0, 3.0])) == 1
    assert sampler.sample(torch.tensor([7.0])) == 0


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    expected = DRAWS * (LOGITS.double() / temperature).softmax(0)
    counts = drawn(SamplingConfig(temperature=temperature))
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < CHI_SQUARE_7
    wrong = DRAWS * (LOGITS.double() / (temperature * 1.15)).softmax(0)
    assert float(((counts - wrong) ** 2 / wrong).sum()) > CHI_SQUARE_7


def test_top_p_draws_as_softmax_over_what_is_kept() -> None:
    probabilities = LOGITS.double().softmax(0)  # 6, 1, 3, 4 hold 0.898
    assert 0.75 < probabilities[[6, 1, 3]].sum() < 0.8 < probabilities[[6, 1, 3, 4]].sum()
    counts = drawn(SamplingConfig(temperature=1.0, top_p=0.8))
    assert counts.nonzero().flatten().tolist() == [1, 3, 4, 6]
    kept = [1, 3, 4, 6]
    expected = DRAWS * probabilities[kept] / probabilities[kept].sum()
    assert float(((counts[kept] - expected) ** 2 / expected).sum()) < 16.27  # 3 degrees of freedom


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-60])
def test_low_temperature_is_nearly_greedy(temperature: float) -> None:
    assert drawn(SamplingConfig(temperature=temperature), 50).argmax() == 6
    assert drawn(SamplingConfig(temperature=temperature), 50)[6] == 50


def test_same_seed_draws_the_same_whatever_else_is_drawn() -> None:
    def run(seed: int) -> list[int]:
        torch.randn(seed)  # the global generator is not used
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(40)]

    first = run(3)
    torch.manual_seed(99)
    assert run(3) == first
    assert run(4) != first


@given(
    st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=30),
    st.floats(0.01, 1.0, exclude_max=True),
)
def test_top_p_keeps_the_smallest_set_that_holds_enough(weights: list[float], top_p: float) -> None:
    probabilities = torch.tensor(weights) / sum(weights)
    kept = keep_top_p(probabilities, top_p)
    chosen = kept > 0
    assert torch.equal(kept[chosen], probabilities[chosen])
    assert kept.sum() >= top_p - 1e-5
    assert kept.sum() - kept[chosen].min() <= top_p + 1e-5  # without its last one it is too small
    if not chosen.all():
        assert kept[chosen].min() >= probabilities[~chosen].max()


def test_top_p_of_equal_probabilities_is_as_few_as_needed() -> None:
    equal = torch.full((4,), 0.25)
    assert [int((keep_top_p(equal, p) > 0).sum()) for p in (0.01, 0.25, 0.26, 0.5, 0.99)] == [
        1,
        1,
        2,
        2,
        4,
    ]


SEEDS = [0, 7, -1, -(2**63) - 1, 2**63 - 1, 2**63, 2**64, 2**64 + 7, 10**30]


def test_any_integer_is_a_seed_and_each_draws_its_own() -> None:
    draws = []
    for seed in SEEDS:
        sampler = Sampler(SamplingConfig(temperature=5.0, seed=seed))
        draws.append(tuple(sampler.sample(LOGITS) for _ in range(30)))
    assert len(set(draws)) == len(SEEDS)
    folded = [generator_seed(seed) for seed in SEEDS]
    assert folded[:2] == SEEDS[:2]
    assert folded[4] == SEEDS[4]
    assert all(0 <= seed < 2**63 for seed in folded)


@pytest.mark.parametrize("policy", ["sketch", "lsh-tables", "verified", "random:seed=-9"])
def test_policies_draw_by_any_seed(policy: str) -> None:
    engine = tiny_engine(policy=policy, budget=8, seed=-(2**70))
    sequence = read(engine, tokens(60))
    assert engine.step([sequence], [3]).isfinite().all()


@pytest.mark.parametrize("seed", [1.5, "3", None, True])
def test_a_seed_that_is_no_integer_is_refused(seed: object) -> None:
    for kind in (SamplingConfig, EngineConfig):
        with pytest.raises(InvalidOptionError, match=r"^seed must be a whole number\. Got "):
            kind(seed=seed)  # type: ignore[arg-type]
