"""The kernels of sketches in plain NumPy and float64, with the same signatures.

`write_codes` and `score_codes` stand for those of `sketch_codes`, `draw_by_weight` for
`weigh.weigh_scores` and `draw.draw_by_weight` one after the other. Weights below exp(-87) of the
largest, which are 0 to the kernels, are kept here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.sketch_codes import high_words
from nearfar.cpu_kernels.sketch_scan import BLOCK_KEYS

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


def _planes(words: int, bits: int, head_dim: int) -> list[tuple[slice, int, int]]:
    """Words, first bit of a level and number of bits of each plane of a code."""
    high = high_words(head_dim, bits)
    low = (slice(high, words), 0, 2 if bits == 3 else bits)
    return [(slice(0, high), 2, 1), low] if bits == 3 else [low]


def _positions(bits: int) -> NDArray[np.int64]:
    """Where the fields of a word start, by dimension."""
    dims = np.arange(32 // bits)
    return 8 * (dims % 4) + bits * (dims // 4)


def write_codes(y: Array, first: int, bits: int, step: float, words: Array, factors: Array) -> None:
    """See `sketch_codes.write_codes`."""
    n, D = y.shape
    levels, factor = quantise(y, bits, step)
    at = first + np.arange(n)
    for span, shift, width in _planes(words.shape[1], bits, D):
        count = span.stop - span.start
        padded = np.zeros((n, count * 32 // width), np.int64)
        padded[:, :D] = (levels >> shift) & (2**width - 1)
        fields = padded.reshape(n, count, -1) << _positions(width)
        words[at // BLOCK_KEYS, span, at % BLOCK_KEYS] = fields.sum(2)
    factors[at] = factor


def read_levels(words: Array, bits: int, head_dim: int) -> NDArray[np.int64]:
    """Levels [..., blocks * BLOCK_KEYS, head_dim] of ``words`` [..., blocks, W, BLOCK_KEYS]."""
    shape = (*words.shape[:-3], words.shape[-3] * BLOCK_KEYS, head_dim)
    levels = np.zeros(shape, np.int64)
    for span, shift, width in _planes(words.shape[-2], bits, head_dim):
        fields = words[..., span, :, None].astype(np.int64) >> _positions(width)
        by_key = np.moveaxis(fields & (2**width - 1), -2, -3)
        flat = by_key.reshape(*shape[:-1], -1)
        levels += flat[..., :head_dim] << shift
    return levels


def score_codes(
    words: Array,
    factors: Array,
    queries: Array,
    scales: Array,
    length: int,
    bits: int,
    scores: Array,
) -> None:
    """See `sketch_codes.score_codes`."""
    low = words.shape[2] - high_words(queries.shape[2], bits)
    D = min(queries.shape[2], low * 32 // (2 if bits == 3 else bits))
    levels = read_levels(words, bits, D)[:, :length] - (2**bits - 1) / 2
    rounded = queries.astype(np.float64) * scales[..., None]
    dots = rounded[..., :D] @ levels.transpose(0, 2, 1)
    scores[:, :, :length] = dots * factors[:, None, :length]


def uniforms(count: int, key: int) -> Floats:
    """Numbers [count] in [0, 1): `draw.uniform` for counters 0 to count - 1."""
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
    scores: Array, length: int, wanted: Array, temper: float, keys: Array
) -> list[tuple[NDArray[np.int64], Floats]]:
    """Indices and log-weights of the keys drawn of each row of ``scores`` [R, heads, >= length]."""
    rows = []
    for r in range(len(scores)):
        weights = softmax_mean(scores[r, :, :length], temper)
        probabilities = inclusion_probabilities(weights, int(wanted[r]))
        drawn = np.flatnonzero(uniforms(length, int(keys[r])) < probabilities)
        # a number of 24 bits is below a probability as often as below its next multiple of 2^-24
        compared = np.ceil(probabilities[drawn] * 2**24) / 2**24
        rows.append((drawn, -np.log(np.minimum(compared, 1))))
    return rows
