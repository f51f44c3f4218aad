"""Sampling far keys in proportion to their estimated weight, without a sort.

For a row of keys with weights w that sum to 1 and a wanted number n, key i is read with probability
pi_i = min(1, c w_i), where c makes the probabilities sum to n. c only grows under the iteration
c <- (n - #certain) / (sum of the others' weights), which ends when no further key becomes certain.
Each key decides by its own uniform number, a hash of the row's key and its position: Poisson
sampling with probability proportional to size, the same on any number of threads.
"""

from __future__ import annotations

import numba
import numpy as np

from nearfar.cpu_kernels.compile import inlined, kernel, serial

TILE = 256
_TO_UNIT = np.float32(2.0**-24)
_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@inlined
def exp_tile(x, count, bits, scale):
    """Replace ``x[:count]``, all <= 0, by its exponential; ``scale`` views ``bits`` int32."""
    for i in range(count):
        y = max(x[i], np.float32(-87.0))
        n = np.floor(y * _LOG2E + np.float32(0.5))
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
        r = y - n * _LN2_HIGH - n * _LN2_LOW
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        x[i] = p * r * r + r + np.float32(1.0)
    for i in range(count):
        x[i] *= scale[i]


@serial
def uniform(counter, key):
    """A number in [0, 1) with 24 bits from a 32-bit hash (two multiply-xorshift rounds)."""
    x = np.uint32(np.uint32(counter) * np.uint32(0x9E3779B9)) ^ np.uint32(key)
    x ^= x >> np.uint32(16)
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x ^= x >> np.uint32(15)
    x = np.uint32(x * np.uint32(0x846CA68B))
    x ^= x >> np.uint32(16)
    return np.float32(np.int32(x >> np.uint32(8))) * _TO_UNIT


@serial
def softmax_mean(scores, temper, weights):
    """Mean over heads of softmax(temper * scores [G, >= N]) into ``weights`` [N]."""
    G = scores.shape[0]
    N = weights.shape[0]
    values = np.empty(TILE, np.float32)
    exponents = np.empty(TILE, np.int32)
    scale = exponents.view(np.float32)
    weights[:] = 0
    for g in range(G):
        row = scores[g]
        top = np.float32(-np.inf)
        for i in range(N):
            top = max(top, row[i])
        mass = np.float32(0)
        for first in range(0, N, TILE):
            count = min(TILE, N - first)
            part = row[first : first + count]
            for i in range(count):
                values[i] = (part[i] - top) * temper
            exp_tile(values, count, exponents, scale)
            for i in range(count):
                part[i] = values[i]
                mass += values[i]
        share = np.float32(1) / (mass * np.float32(G))
        for i in range(N):
            weights[i] += row[i] * share


@serial
def sampling_constant(weights, wanted):
    """The c for which min(1, c w) sums to ``wanted``, which is less than the number of keys."""
    N = weights.shape[0]
    constant = np.float32(0)
    certain = -1
    rest = np.float32(0)
    for i in range(N):
        rest += weights[i]
    fixed = 0
    while fixed > certain and rest > 0:
        certain = fixed
        constant = np.float32(wanted - certain) / rest
        limit = np.float32(1) / constant
        fixed = 0
        rest = np.float32(0)
        for i in range(N):
            light = weights[i] < limit
            fixed += 0 if light else 1
            rest += weights[i] if light else np.float32(0)
        if fixed >= wanted:
            break
    return constant


@kernel
def draw_by_weight(
    scores,  # [R, G, >= N] float32: logits up to a constant per head; overwritten
    wanted,  # [R] int64: expected number of keys of each row, below N
    temper,  # exponent of the weight: below 1 flattens the law for noisy scores
    keys,  # [R] uint32: what seeds each row's draws
    weights,  # [R, N] float32: workspace
    indices,  # [R, N] int32, written: the keys drawn, ascending
    log_weights,  # [R, N] float32, written: -log(probability)
    counts,  # [R] int64, written: how many were drawn
):
    """Draw each row's keys with probability proportional to their mean softmax weight."""
    R, N = weights.shape
    for r in numba.prange(R):
        weight = weights[r]
        softmax_mean(scores[r], np.float32(temper), weight)
        constant = sampling_constant(weight, wanted[r])
        count = 0
        for i in range(N):
            probability = constant * weight[i]
            if uniform(i, keys[r]) < probability:
                indices[r, count] = i
                weight[count] = probability  # count <= i: what is overwritten was read already
                count += 1
        for i in range(count):
            # what the comparison with a number of 24 bits really lets through
            probability = np.ceil(weight[i] / _TO_UNIT) * _TO_UNIT
            log_weights[r, i] = -np.log(min(probability, np.float32(1)))
        counts[r] = count
