from __future__ import annotations

import pytest

from nearfar.gpu_kernels.weighted_draw import SHARE_UNIT
from nearfar.runtime.steps.gpu.fetch_balance import (
    HANDOFF_NS,
    LEAST,
    MOST,
    SETTLING_STEPS,
    FetchBalance,
)


def step(division: FetchBalance, near: float, latency: float, fetch: float, host: float) -> float:
    """A step on a machine with such rates; by how much the two processors miss each other."""
    share = division.share / SHARE_UNIT
    gpu = latency + fetch * share
    division.learn(near, gpu, host * (1 - share))
    return near + gpu - host * (1 - share) - HANDOFF_NS


@pytest.mark.parametrize(
    ("fetch", "host"), [(120e3, 75e3), (200e3, 100e3), (80e3, 300e3), (300e3, 60e3)]
)
def test_both_processors_end_together(fetch: float, host: float) -> None:
    division = FetchBalance()
    for _ in range(SETTLING_STEPS - 1):
        step(division, 10e3, 3e3, fetch, host)
    missed = step(division, 10e3, 3e3, fetch, host)
    if LEAST < division.share < MOST:
        assert abs(missed) < (fetch + host) / SHARE_UNIT * 2


def test_it_stays_within_bounds() -> None:
    for fetch, host, bound in ((1e3, 1e6, MOST), (1e7, 1e3, LEAST)):
        division = FetchBalance()
        for _ in range(SETTLING_STEPS):
            step(division, 10e3, 0.0, fetch, host)
        assert division.share == bound


def test_a_disturbed_step_moves_little_and_later_ones_nothing() -> None:
    division = FetchBalance()
    for number in range(SETTLING_STEPS):
        step(division, 10e3, 3e3, 120e3, 75e3 * (10 if number == 9 else 1))
    share = division.share
    assert 64 < share < 100
    assert division.settled
    step(division, 10e3, 3e3, 500e3, 10e3)
    assert division.share == share
    division.restart()
    assert division.share == share
    for _ in range(SETTLING_STEPS):
        step(division, 10e3, 3e3, 500e3, 75e3)
    assert division.share < share
