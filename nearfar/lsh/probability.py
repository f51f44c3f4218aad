"""The probability that two vectors collide in hash tables of random hyperplanes.

Float64 on NumPy arrays, in logarithms where a probability may be too small for a float: at 16 bits
a pair of nearly opposite vectors has one of 1e-70. Every sum here is of positive terms, so nothing
cancels. Source: MagicPIG, arXiv 2410.16179, equation 10 and algorithm 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

TABLE_INTERVALS = 4096


def log_collision_probability(cosine: ArrayLike, bits_per_table: int) -> Floats:
    """Log of p^bits with p = 1 - angle / pi: two vectors get the same code in one table.

    A cosine that rounding carried outside [-1, 1] counts as -1 or 1. At -1 the result is -inf.
    """
    angle = np.arccos(np.clip(np.asarray(cosine, np.float64), -1.0, 1.0))
    return _log_collision_at(angle / np.pi, bits_per_table)


def _log_collision_at(turn: Floats, bits_per_table: int) -> Floats:
    """The same at ``turn`` = angle / pi."""
    with np.errstate(divide="ignore"):
        return np.asarray(bits_per_table * np.log1p(-turn))


def log_at_least(log_probability: ArrayLike, num_tables: int, min_collisions: int) -> Floats:
    """Log of the probability to collide in at least ``min_collisions`` of ``num_tables`` tables.

    ``log_probability`` is that of one table; tables are independent, so this is the upper tail of a
    binomial law. For two collisions it is u = 1 - (1 - x)^L - L x (1 - x)^(L - 1).
    """
    log_hit = np.asarray(log_probability, np.float64)
    total = np.full(log_hit.shape, -np.inf)
    with np.errstate(divide="ignore"):
        log_miss = np.log(-np.expm1(log_hit))
    for hits in range(min_collisions, num_tables + 1):
        misses = num_tables - hits
        term = math.log(math.comb(num_tables, hits)) + hits * log_hit
        total = np.logaddexp(total, term + misses * log_miss if misses else term)
    return np.asarray(np.minimum(total, 0.0))


def at_least(
    cosine: ArrayLike, bits_per_table: int, num_tables: int, min_collisions: int
) -> Floats:
    """Probability u that a key at this cosine to the query is a candidate."""
    return np.exp(
        log_at_least(log_collision_probability(cosine, bits_per_table), num_tables, min_collisions)
    )


def log_weight_table(
    bits_per_table: int, num_tables: int, min_collisions: int, floor: float
) -> NDArray[np.float32]:
    """Log-weights -log(min(1, u + floor)) at 4,097 even steps of the angle from 0 to pi.

    The error of linear interpolation is below 1e-3 up to 0.99 pi wherever u is above 1e-9. The last
    point is just before the opposite direction, where u is 0 and its logarithm infinite.
    """
    turn = np.linspace(0.0, 1.0, TABLE_INTERVALS + 1)
    turn[-1] = 1.0 - 1e-6
    log_hit = _log_collision_at(turn, bits_per_table)
    log_u = log_at_least(log_hit, num_tables, min_collisions)
    with np.errstate(divide="ignore"):
        floored = np.logaddexp(log_u, np.log(floor))
    return (-np.minimum(floored, 0.0)).astype(np.float32)
