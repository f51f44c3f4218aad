"""Collision probabilities against exact arithmetic and against hyperplanes that were drawn."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from nearfar.lsh.probability import (
    at_least,
    log_at_least,
    log_collision_probability,
    log_weight_table,
)
from nearfar.lsh.projections import random_projections


def exact_tail(x: Fraction, tables: int, minimum: int) -> Fraction:
    return 1 - sum(
        (math.comb(tables, j) * x**j * (1 - x) ** (tables - j) for j in range(minimum)),
        Fraction(0),
    )


@pytest.mark.parametrize(
    ("tables", "minimum"), [(1, 1), (2, 2), (75, 2), (150, 2), (150, 1), (150, 7), (300, 300)]
)
@pytest.mark.parametrize("x", ["1/2", "1/1024", "1/1000000", "1/10000000000000", "999999/1000000"])
def test_tail_equals_exact_arithmetic(x: str, tables: int, minimum: int) -> None:
    value = Fraction(x)
    tail = exact_tail(value, tables, minimum)
    expected = math.log(tail.numerator) - math.log(tail.denominator)
    got = float(log_at_least(math.log(value), tables, minimum))
    assert got == pytest.approx(expected, rel=1e-11, abs=1e-11)


def test_tail_of_a_probability_far_below_the_smallest_float() -> None:
    log_x = -500.0  # u is about C(150, 2) exp(-1000), which is 0 in float64
    expected = math.log(math.comb(150, 2)) + 2 * log_x
    assert float(log_at_least(log_x, 150, 2)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bits", [1, 10, 16])
def test_ends_of_the_range(bits: int) -> None:
    cosines = [-1.0 - 1e-9, -1.0, 0.0, 1.0, 1.0 + 1e-6]
    logs = log_collision_probability(cosines, bits)
    np.testing.assert_allclose(logs, [-np.inf, -np.inf, -bits * math.log(2), 0, 0], rtol=1e-12)
    u = at_least(cosines, bits, 150, 2)
    assert u[0] == u[1] == 0
    assert u[3] == u[4] == 1
    np.testing.assert_allclose(u[2], float(exact_tail(Fraction(1, 2**bits), 150, 2)), rtol=1e-9)


def test_probability_rises_with_the_cosine() -> None:
    u = log_at_least(log_collision_probability(np.linspace(-0.999, 0.999, 999), 16), 300, 2)
    assert np.all(np.isfinite(u))
    assert np.all(np.diff(u) >= -1e-12)  # flat at 1 but for rounding


@pytest.mark.parametrize("cosine", [-0.6, 0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("bits", [1, 4])
def test_drawn_hyperplanes_collide_as_often_as_said(cosine: float, bits: int) -> None:
    tables = 4000
    first = torch.zeros(5)
    first[1] = 2.0
    second = torch.zeros(5)
    second[1], second[3] = cosine, math.sqrt(1 - cosine**2)
    codes = random_projections(5, bits, tables, 7).codes(torch.stack([first, second]))
    hits = int((codes[:, 0] == codes[:, 1]).sum())
    p = float(np.exp(log_collision_probability(cosine, bits)))
    assert abs(hits - tables * p) < 4 * math.sqrt(tables * p * (1 - p))


@pytest.mark.parametrize(
    ("bits", "tables", "minimum"),
    [(1, 1, 1), (1, 2, 2), (4, 20, 1), (8, 75, 2), (10, 150, 2), (16, 2, 2), (16, 300, 3)],
)
@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_weight_table_interpolates(bits: int, tables: int, minimum: int, floor: float) -> None:
    table = log_weight_table(bits, tables, minimum, floor)
    assert table.dtype == np.float32
    assert np.all(np.isfinite(table))
    assert table.min() >= 0
    angles = np.linspace(0, 0.99 * np.pi, 10_007)
    u = at_least(np.cos(angles), bits, tables, minimum)
    seen = u > 1e-9
    got = np.interp(angles, np.linspace(0, np.pi, len(table)), table)
    want = -np.log(np.minimum(u[seen] + floor, 1))
    np.testing.assert_allclose(got[seen], want, atol=1e-3)
