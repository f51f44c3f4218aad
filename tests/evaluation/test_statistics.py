from __future__ import annotations

import math

import numpy as np
import pytest

from nearfar.evaluation.statistics import Scores, estimate, ratio


def scores(*values: float, per_case: int = 1) -> Scores:
    return {divmod(i, per_case): value for i, value in enumerate(values)}


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(50, 10, 400)
    found = estimate([scores(*values)])
    assert found.value == pytest.approx(values.mean())
    wanted = 1.96 * values.std() / 20
    assert found.high - found.value == pytest.approx(wanted, rel=0.1)
    assert found.value - found.low == pytest.approx(wanted, rel=0.1)
    assert found.samples == 400


def test_questions_of_one_context_are_not_independent() -> None:
    values = [value for value in (0.0, 100.0) * 10 for _ in range(8)]
    whole, alone = estimate([scores(*values, per_case=8)]), estimate([scores(*values)])
    assert whole.value == alone.value == 50
    assert whole.high - whole.low > 2 * (alone.high - alone.low)


def test_few_contexts_are_resampled_by_question() -> None:
    values = (0.0, 100.0) * 4
    found = estimate([scores(*values, per_case=2)])
    assert found.low < 50 < found.high


def test_tasks_weigh_alike_and_logs_become_perplexities() -> None:
    found = estimate([scores(*[100.0] * 30), scores(0.0, 0.0)])
    assert (found.value, found.low, found.high, found.samples) == (50, 50, 50, 32)
    perplexity = estimate([scores(1.0, 3.0)], logs=True)
    assert perplexity.value == pytest.approx(math.e**2)
    assert perplexity.low == pytest.approx(math.e)


def test_a_ratio_is_of_the_same_samples() -> None:
    exact = scores(*([100.0, 0.0] * 20))
    same = ratio([(exact, exact)])
    assert same is not None
    assert (same.value, same.low, same.high) == (1, 1, 1)  # paired: no width at all
    worse = {key: value if key[0] > 9 else 0.0 for key, value in exact.items()}
    part = ratio([(worse, exact)])
    assert part is not None
    assert part.value == pytest.approx(0.75)
    assert part.low < 0.75 < part.high < 1
    missing = {key: value for key, value in exact.items() if key[0] != 3}
    found = ratio([(missing, exact)])
    assert found is not None
    assert found.samples == 39


def test_no_ratio_without_common_samples_or_to_nothing() -> None:
    assert ratio([({(0, 0): 1.0}, {(1, 0): 1.0})]) is None
    assert ratio([(scores(1.0), scores(0.0))]) is None


def test_the_same_rows_have_the_same_interval() -> None:
    values = scores(*np.random.default_rng(3).random(9))
    assert estimate([values]) == estimate([values])
