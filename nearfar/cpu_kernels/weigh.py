"""Softmax numerators of all keys for all query heads, a run of keys at a time.

Each run has its own largest score, so one pass over the scores suffices: numerators are relative to
the run's top, and their reader multiplies them by exp(top of the run - top of the row). Scores are
made and used while they are in the first-level cache.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from nearfar.cpu_kernels.compile import emitted, kernel
from nearfar.cpu_kernels.sketch_codes import RUN_BLOCKS, RUN_KEYS, score_run
from nearfar.cpu_kernels.sketch_scan import BLOCK_KEYS
from nearfar.cpu_kernels.vectors import FLOATS, LANES, Emitter, floats, number


def padded_keys(num_keys: int) -> int:
    """``num_keys`` rounded up to whole runs."""
    return -(-num_keys // RUN_KEYS) * RUN_KEYS


@intrinsic
def _exp_run(typing_context, scores, row, temper, out, at, tops, masses):
    def generate(context, builder, signature, arguments):
        emit, b = Emitter(context, builder), builder
        source, target, top, mass = (
            emit.array(kind, arguments[i])[0]
            for i, kind in ((0, scores), (3, out), (5, tops), (6, masses))
        )
        _, (_, width) = emit.array(out, arguments[3])
        row, at = arguments[1], arguments[4]
        source = emit.at(source, emit.times(row, 4 * RUN_KEYS))
        target = emit.at(target, emit.times(b.add(emit.times(row, width), at), 4))
        highest, total = emit.local(FLOATS), emit.local(FLOATS)
        emit.store(floats(float("-inf")), highest)
        emit.store(floats(0.0), total)
        with emit.loop(number(4 * RUN_KEYS), step=4 * LANES) as offset:
            score = emit.load(emit.at(source, offset), FLOATS)
            emit.store(emit.maximum(score, emit.load(highest, FLOATS)), highest)
        largest = emit.over_groups(emit.load(highest, FLOATS), LANES, emit.maximum)
        scale = emit.splat(arguments[2])
        with emit.loop(number(4 * RUN_KEYS), step=4 * LANES) as offset:
            score = emit.load(emit.at(source, offset), FLOATS)
            numerator = emit.exp(b.fmul(b.fsub(score, largest), scale))
            emit.store(numerator, emit.at(target, offset))
            emit.store(b.fadd(numerator, emit.load(total, FLOATS)), total)
        added = emit.over_groups(emit.load(total, FLOATS), LANES, b.fadd)
        emit.store(emit.lane(largest, 0), emit.at(top, emit.times(row, 4)))
        emit.store(emit.lane(added, 0), emit.at(mass, emit.times(row, 4)))
        return context.get_dummy_value()

    whole = types.int64
    return types.void(scores, whole, types.float32, out, whole, tops, masses), generate


@emitted
def exp_run(
    scores,  # [G, RUN_KEYS] float32; -inf where there is no key
    row,
    temper,
    out,  # [G, padded] float32, written from `at` on: exp(temper (score - top)), 0 for no key
    at,
    tops,  # [G] float32, written at `row`: largest of these scores
    masses,  # [G] float32, written at `row`: sum of what was written
):
    """Softmax numerators of one run of scores."""
    _exp_run(scores, row, np.float32(temper), out, at, tops, masses)


@kernel
def weigh_codes(
    words,  # [Hkv, blocks, W, BLOCK_KEYS] uint32
    factors,  # [Hkv, capacity] float32
    queries,  # [Hkv, G, D padded] int8
    scales,  # [Hkv, G] float32
    length,
    bits,
    temper,
    numerators,  # [Hkv, G, padded_keys(length)] float32, written
    tops,  # [Hkv, runs, G] float32, written
    masses,  # [Hkv, runs, G] float32, written
):
    """Softmax numerators of the estimated dot products of all keys of all heads."""
    Hkv, G, _ = queries.shape
    runs = tops.shape[1]
    blocks = (length + BLOCK_KEYS - 1) // BLOCK_KEYS
    for task in numba.prange(Hkv * runs):
        h = task // runs
        run = task % runs
        first = run * RUN_BLOCKS
        stop = min(first + RUN_BLOCKS, blocks)
        scores = np.empty((G, RUN_KEYS), np.float32)
        score_run(words[h], factors[h], queries[h], scales[h], bits, first, stop, scores)
        for g in range(G):
            scores[g, length - run * RUN_KEYS :] = -np.inf
            exp_run(scores, g, temper, numerators[h], run * RUN_KEYS, tops[h, run], masses[h, run])


@kernel
def weigh_scores(
    scores,  # [R, G, >= length] float32
    length,
    temper,
    numerators,  # [R, G, padded_keys(length)] float32, written
    tops,  # [R, runs, G] float32, written
    masses,  # [R, runs, G] float32, written
):
    """Softmax numerators of scores that are known."""
    R, G, _ = scores.shape
    runs = tops.shape[1]
    for task in numba.prange(R * runs):
        r = task // runs
        run = task % runs
        start = run * RUN_KEYS
        count = min(length - start, RUN_KEYS)
        own = np.full((G, RUN_KEYS), -np.inf, np.float32)
        for g in range(G):
            own[g, :count] = scores[r, g, start : start + count]
            exp_run(own, g, temper, numerators[r], start, tops[r, run], masses[r, run])
