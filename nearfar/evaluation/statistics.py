"""Means of samples with their intervals, by the bootstrap.

Scores of one context are not independent. With enough contexts they are resampled whole; with fewer
than `FEWEST_CONTEXTS` questions are, and the interval is then somewhat too narrow. If all scores
are equal the interval has no width: look at the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
FEWEST_CONTEXTS = 5
LEVEL = 95  # percent

Scores = Mapping[tuple[int, int], float]  # by case and question


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval, and the number of samples."""

    value: float
    low: float
    high: float
    samples: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high; None of one sample, which says nothing of how others would differ."""
        return None if self.samples == 1 else (self.low, self.high)


def estimate(strata: Sequence[Scores], *, logs: bool = False) -> Estimate:
    """The mean over strata (tasks) of the means of their scores; ``logs``: its exponential."""
    draws = np.mean([_means(_units(each)) for each in strata], axis=0)
    value = float(np.mean([np.mean(list(each.values())) for each in strata]))
    low, high = _interval(draws)
    if logs:
        value, low, high = (float(np.exp(each)) for each in (value, low, high))
    return Estimate(value, low, high, sum(len(each) for each in strata))


def ratio(strata: Sequence[tuple[Scores, Scores]]) -> Estimate | None:
    """The first scores' mean over that of the second, on samples that both have, resampled alike.

    None where nothing is in common or the second mean is 0.
    """
    pairs = [({key: ours[key] for key in ours if key in theirs}, theirs) for ours, theirs in strata]
    pairs = [(ours, {key: theirs[key] for key in ours}) for ours, theirs in pairs if ours]
    if not pairs:
        return None
    above = np.mean([_means(_units(ours)) for ours, _ in pairs], axis=0)
    below = np.mean([_means(_units(theirs)) for _, theirs in pairs], axis=0)
    whole_above, whole_below = (
        float(np.mean([np.mean(list(pair[side].values())) for pair in pairs])) for side in (0, 1)
    )
    if whole_below == 0:
        return None
    usable = below > 0
    low, high = _interval(above[usable] / below[usable])
    return Estimate(whole_above / whole_below, low, high, sum(len(ours) for ours, _ in pairs))


def _units(scores: Scores) -> list[list[float]]:
    """Scores of each context, or each score alone where there are few contexts."""
    by_case: dict[int, list[float]] = {}
    for (case, _), score in sorted(scores.items()):
        by_case.setdefault(case, []).append(score)
    if len(by_case) >= FEWEST_CONTEXTS:
        return list(by_case.values())
    return [[each] for unit in by_case.values() for each in unit]


def _means(units: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Means of resamples of ``units``; units of equal number are drawn alike."""
    sums = np.array([sum(unit) for unit in units], np.float64)
    counts = np.array([len(unit) for unit in units], np.float64)
    draws = np.random.default_rng(len(units)).multinomial(
        len(units), [1 / len(units)] * len(units), RESAMPLES
    )
    means: NDArray[np.float64] = (draws @ sums) / (draws @ counts)
    return means


def _interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(draws, (tail, 100 - tail))
    return float(low), float(high)
