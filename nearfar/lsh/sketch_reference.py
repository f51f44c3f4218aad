"""A sketch and its sampling law written down without codes or kernels, in float64.

Levels are found by trying all of them, probabilities by a sort. Slow, short, and independent of
the code that it checks. One KV head at a time; a budget is a number of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.sketch_reference import inclusion_probabilities, softmax_mean

Floats = NDArray[np.float64]

# least mean squared error of 2^bits even levels for a standard normal number (Max, "Quantizing for
# minimum distortion", 1960, table II)
DISTORTION = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}


@dataclass(frozen=True)
class ReferenceSketch:
    """``levels`` [N, D], centred on zero, ``factors`` [N] and the ``rotation`` [D, D] they use."""

    levels: Floats
    factors: Floats
    rotation: Floats

    def scores(self, queries: Floats) -> Floats:
        """Estimates [G, N] of q . (key - mean) for ``queries`` [G, D], rotated and then rounded."""
        turned = queries @ self.rotation.T
        unit = np.maximum(np.abs(turned).max(1, keepdims=True), 1e-30) / 127
        estimates: Floats = np.round(turned / unit) * unit @ self.levels.T * self.factors
        return estimates


def sketch_keys(
    keys: Floats, mean: Floats, rotation: Floats, bits: int, width: float
) -> ReferenceSketch:
    """Sketch ``keys`` [N, D] less ``mean`` [D]: each rotated coordinate takes its nearest level.

    The distance of levels is ``width`` root mean squares of a key's coordinates.
    """
    y = (keys - mean) @ rotation.T
    choices = np.arange(2**bits) - (2**bits - 1) / 2
    size = np.sqrt((y**2).mean(1))[:, None, None] * width
    levels = choices[np.abs(y[:, :, None] - choices * size).argmin(2)]
    along = (y * levels).sum(1)
    factors = np.divide((y**2).sum(1), along, out=np.zeros(len(y)), where=along > 0)
    return ReferenceSketch(levels, factors, rotation)


def expected_error(bits: int, head_dim: int) -> float:
    """Root mean square error of a score of Gaussian keys, as a share of |q'| |y|.

    y is the centred key and q' the part of the query at right angles to it; along y the estimate is
    exact. A code at angle t to its key has cos^2 t = 1 - distortion, and its part at right angles
    to y has a random direction in D - 1 dimensions: the error is tan t / sqrt(D - 1).
    """
    distortion = DISTORTION[bits]
    return math.sqrt(distortion / (1 - distortion) / (head_dim - 1))


def read_probabilities(scores: Floats, budget: int, temper: float) -> Floats:
    """Probability [N] that each key is read, given ``scores`` [G, N] of the heads of a row."""
    return inclusion_probabilities(softmax_mean(scores, temper), budget)


def horvitz_thompson(values: Floats, probabilities: Floats, read: NDArray[np.int32]) -> float:
    """Estimate of the sum of ``values`` [N] from the keys ``read`` [M] (Horvitz, Thompson 1952)."""
    return float((values[read] / probabilities[read]).sum())
