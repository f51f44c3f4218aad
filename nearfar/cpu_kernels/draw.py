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
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nearfar.cpu_kernels.bits import lowest_bit
from nearfar.cpu_kernels.compile import emitted, kernel, serial
from nearfar.cpu_kernels.sketch_codes import RUN_KEYS
from nearfar.cpu_kernels.vectors import FLOATS, INT32, INTS, LANES, Emitter, floats, ints

_TO_UNIT = np.float32(2.0**-24)
_SPREAD, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


@serial
def uniform(counter, key):
    """A number in [0, 1) with 24 bits from a 32-bit hash (two multiply-xorshift rounds)."""
    x = np.uint32(np.uint32(counter) * np.uint32(_SPREAD)) ^ np.uint32(key)
    x ^= x >> np.uint32(16)
    x = np.uint32(x * np.uint32(_FIRST))
    x ^= x >> np.uint32(15)
    x = np.uint32(x * np.uint32(_SECOND))
    x ^= x >> np.uint32(16)
    return np.float32(np.int32(x >> np.uint32(8))) * _TO_UNIT


@intrinsic
def _drawn(typing_context, weights, row, first, constant, key):
    def generate(context, builder, signature, arguments):
        emit, b = Emitter(context, builder), builder
        start, (_, width) = emit.array(weights, arguments[0])
        place = emit.times(b.add(emit.times(arguments[1], width), arguments[2]), 4)
        counter = b.add(
            emit.splat_int(b.trunc(arguments[2], INT32)), ir.Constant(INTS, list(range(LANES)))
        )
        x = b.xor(b.mul(counter, ints(_SPREAD)), emit.splat_int(arguments[4]))
        x = b.mul(b.xor(x, b.lshr(x, ints(16))), ints(_FIRST))
        x = b.mul(b.xor(x, b.lshr(x, ints(15))), ints(_SECOND))
        x = b.xor(x, b.lshr(x, ints(16)))
        number = b.fmul(b.sitofp(b.lshr(x, ints(8)), FLOATS), floats(float(_TO_UNIT)))
        weight = emit.load(emit.at(start, place), FLOATS)
        below = b.fcmp_ordered("<", number, b.fmul(weight, emit.splat(arguments[3])))
        return b.zext(b.bitcast(below, ir.IntType(LANES)), INT32)

    whole = types.int64
    return types.uint32(weights, whole, whole, types.float32, types.uint32), generate


@emitted
def drawn_lanes(weights, row, first, constant, key):
    """Which of LANES keys from ``first`` on are drawn, as bits: uniform < constant * weight."""
    return _drawn(weights, row, first, np.float32(constant), np.uint32(key))


@serial
def mean_weights(
    numerators,  # [G, padded] float32, see `weigh`
    tops,  # [runs, G] float32
    masses,  # [runs, G] float32
    first,  # the heads are first to first + heads
    heads,
    temper,
    row,
    weights,  # [R, padded] float32, written at `row`
):
    """Mean over a few heads of their softmax weights."""
    runs = tops.shape[0]
    weights[row, :] = 0.0
    for g in range(first, first + heads):
        top = np.float32(-np.inf)
        for run in range(runs):
            top = max(top, tops[run, g])
        mass = np.float32(0.0)
        for run in range(runs):
            mass += masses[run, g] * np.exp((tops[run, g] - top) * temper)
        for run in range(runs):
            share = np.exp((tops[run, g] - top) * temper) / (mass * np.float32(heads))
            for i in range(run * RUN_KEYS, (run + 1) * RUN_KEYS):
                weights[row, i] += numerators[g, i] * share


@serial
def sampling_constant(weights, wanted):
    """The c for which min(1, c w) sums to ``wanted``, a number below the number of keys."""
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
    numerators,  # [Hkv, G, padded] float32: softmax numerators, see `weigh`
    tops,  # [Hkv, runs, G] float32: what they are relative to
    masses,  # [Hkv, runs, G] float32: their sums
    wanted,  # [R] int64: expected number of keys of each row of Hkv G / R heads, below length
    temper,  # exponent of the weight that the numerators were made with
    keys,  # [R] uint32: what seeds each row's draws
    weights,  # [R, padded] float32, written: from the start -log(probability) of the keys drawn
    indices,  # [R, padded] int32, written: the keys drawn, ascending
    counts,  # [R] int64, written: how many were drawn
):
    """Draw each row's keys with probability proportional to their mean softmax weight."""
    R, padded = weights.shape
    G = tops.shape[2]
    heads = tops.shape[0] * G // R
    for r in numba.prange(R):
        h = r * heads // G
        mean_weights(
            numerators[h], tops[h], masses[h], r * heads % G, heads, np.float32(temper), r, weights
        )
        constant = sampling_constant(weights[r], wanted[r])
        count = 0
        for first in range(0, padded, LANES):
            mask = drawn_lanes(weights, r, first, constant, keys[r])
            while mask != 0:
                i = first + lowest_bit(mask)
                mask &= mask - np.uint32(1)
                indices[r, count] = i
                weights[r, count] = constant * weights[r, i]  # count <= i: it was read already
                count += 1
        for i in range(count):
            # what the comparison with a number of 24 bits really lets through
            probability = np.ceil(weights[r, i] / _TO_UNIT) * _TO_UNIT
            weights[r, i] = -np.log(min(probability, np.float32(1)))
        counts[r] = count
