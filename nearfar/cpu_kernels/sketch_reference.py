"""What the kernels behind sketches compute, in plain NumPy and float64, with the same signatures.

`write_codes` and `score_codes` stand for those of `sketch_codes`, `draw_by_weight` for that of
`draw`. Weights that a kernel clamps at exp(-87) of the largest are not clamped here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.sketch_codes import LANES, dims_per_word

Array = NDArray[Any]
Floats = NDArray[np.float64]

_LOW_32 = np.uint64(0xFFFFFFFF)


def quantise(y: Array, bits: int, step: float) -> tuple[NDArray[np.int64], Floats]:
    """Levels [n, D] from 0 to 2^bits - 1, and factors [n], of ``y`` [n, D]."""
    y = y.astype(np.float64)
    square = (y**2).sum(1)
    width = np.maximum(np.sqrt(square / y.shape[1]) * step, 1e-30)
    levels = np.clip(np.floor(y / width[:, None] + 2**bits // 2), 0, 2**bits - 1)
    along = (y * (levels - (2**bits - 1) / 2)).sum(1)
    factors = np.divide(square, along, out=np.zeros_like(square), where=along > 0)
    return levels.astype(np.int64), factors


def write_codes(y: Array, first: int, bits: int, step: float, words: Array, factors: Array) -> None:
    """See `sketch_codes.write_codes`."""
    n, D = y.shape
    levels, factor = quantise(y, bits, step)
    padded = np.zeros((n, words.shape[1] * dims_per_word(bits)), np.int64)
    padded[:, :D] = levels
    shifted = padded.reshape(n, words.shape[1], -1) << bits * np.arange(dims_per_word(bits))
    at = first + np.arange(n)
    words[at // LANES, :, at % LANES] = shifted.sum(2)
    factors[at] = factor


def read_levels(words: Array, bits: int) -> NDArray[np.int64]:
    """Levels [..., blocks * LANES, W * dims per word] of ``words`` [..., blocks, W, LANES]."""
    per_word = dims_per_word(bits)
    fields = words[..., None].astype(np.int64) >> bits * np.arange(per_word)
    by_key: NDArray[np.int64] = np.moveaxis(fields & (2**bits - 1), -2, -3)
    return by_key.reshape(*words.shape[:-3], -1, words.shape[-2] * per_word)


def score_codes(
    words: Array, factors: Array, queries: Array, length: int, bits: int, scores: Array
) -> None:
    """See `sketch_codes.score_codes`."""
    levels = read_levels(words, bits)[:, :length] - (2**bits - 1) / 2
    dots = queries.astype(np.float64) @ levels.transpose(0, 2, 1)
    scores[:, :, :length] = dots * factors[:, None, :length]


def uniforms(count: int, key: int) -> Floats:
    """Numbers [count] in [0, 1): what `draw.uniform` gives for counters 0 to count - 1."""
    x = (np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B9) & _LOW_32) ^ np.uint64(key)
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x7FEB352D) & _LOW_32
    x ^= x >> np.uint64(15)
    x = x * np.uint64(0x846CA68B) & _LOW_32
    x ^= x >> np.uint64(16)
    return (x >> np.uint64(8)).astype(np.float64) / 2**24


def softmax_mean(scores: Array, temper: float) -> Floats:
    """Mean over heads [N] of softmax(temper * ``scores`` [G, N])."""
    logits = temper * scores.astype(np.float64)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    mean: Floats = (weights / weights.sum(1, keepdims=True)).mean(0)
    return mean


def inclusion_probabilities(weights: Array, wanted: int) -> Floats:
    """The probabilities min(1, c w) [N] that sum to ``wanted`` < N, for ``weights`` [N] > 0.

    By a sort: the m heaviest are certain, m being the least for which the next one,
    (wanted - m) w / (sum of all but the m heaviest), is no more than 1.
    """
    weights = weights.astype(np.float64)
    heaviest = np.sort(weights)[::-1]
    rest = np.cumsum(heaviest[::-1])[::-1]
    left = wanted - np.arange(wanted)
    certain = int(np.argmax(left * heaviest[:wanted] <= rest[:wanted]))
    constant = float(left[certain] / rest[certain])
    return np.asarray(np.minimum(1.0, constant * weights))


def draw_by_weight(
    scores: Array,
    wanted: Array,
    temper: float,
    keys: Array,
    weights: Array,
    indices: Array,
    log_weights: Array,
    counts: Array,
) -> None:
    """See `draw.draw_by_weight`; here ``scores`` stay as they are."""
    R, N = weights.shape
    for r in range(R):
        weights[r] = softmax_mean(scores[r, :, :N], temper)
        probabilities = inclusion_probabilities(weights[r], int(wanted[r]))
        drawn = np.flatnonzero(uniforms(N, int(keys[r])) < probabilities)
        counts[r] = len(drawn)
        indices[r, : len(drawn)] = drawn
        # a number of 24 bits is below a probability as often as below its next multiple of 2^-24
        compared = np.ceil(probabilities[drawn] * 2**24) / 2**24
        log_weights[r, : len(drawn)] = -np.log(np.minimum(compared, 1))
