"""Codes of 1 to 4 bits per dimension: writing them, and scoring all of them for some queries.

Layout. Keys lie in blocks of LANES. Within a block the same word of all its keys is contiguous:
words [Hkv, blocks, W, LANES] uint32, where a word holds floor(32 / bits) dimensions, lowest bits
first. Scoring therefore runs over the keys of a block side by side in vector lanes, without a
horizontal sum; the arithmetic is float32 throughout. Scores are what a query's dot product with the
decoded key is, times that key's factor.
"""

from __future__ import annotations

import numba
import numpy as np

from nearfar.cpu_kernels.compile import kernel

LANES = 64


def dims_per_word(bits: int) -> int:
    """Dimensions in one 32-bit word."""
    return 32 // bits


def words_per_key(head_dim: int, bits: int) -> int:
    """Words W of one key's code."""
    return -(-head_dim // dims_per_word(bits))


@kernel
def write_codes(
    y,  # [n, D] float32: centred and rotated keys of one KV head
    first,  # position of y[0] among the head's keys
    bits,
    step,  # width of a level, in units of the root mean square of a key's coordinates
    words,  # [blocks, W, LANES] uint32, written
    factors,  # [blocks * LANES] float32, written
):
    """Quantise ``y`` to the levels 0 .. 2^bits - 1, centred on zero, and write codes and factors.

    The factor of a key is |y|^2 / (y . levels), with levels centred, so that the estimated dot
    product of y with a parallel vector is right (Gao and Long, RaBitQ, arXiv 2405.12497).
    """
    n, D = y.shape
    levels = 1 << bits
    middle = np.float32(levels - 1) / np.float32(2)
    per_word = 32 // bits
    W = words.shape[1]
    blocks = (first + n - 1) // LANES - first // LANES + 1
    # threads own whole blocks, so that no two write to the same cache line
    for b in numba.prange(blocks):
        block = first // LANES + b
        start = max(block * LANES - first, 0)
        stop = min((block + 1) * LANES - first, n)
        for i in range(start, stop):
            lane = (first + i) % LANES
            square = np.float32(0)
            for d in range(D):
                square += y[i, d] * y[i, d]
            width = max(np.sqrt(square / np.float32(D)) * np.float32(step), np.float32(1e-30))
            along = np.float32(0)
            for w in range(W):
                word = np.uint32(0)
                for j in range(min(per_word, D - w * per_word)):
                    value = y[i, w * per_word + j]
                    level = np.floor(value / width + np.float32(levels // 2))
                    level = min(max(level, np.float32(0)), np.float32(levels - 1))
                    along += value * (level - middle)
                    word |= np.uint32(np.uint32(level) << np.uint32(bits * j))
                words[block, w, lane] = word
            factors[first + i] = square / along if along > 0 else np.float32(0)


@kernel
def score_codes(
    words,  # [Hkv, blocks, W, LANES] uint32
    factors,  # [Hkv, capacity] float32
    queries,  # [Hkv, G, W * dims per word] float32: rotated, zero beyond D
    length,
    bits,
    scores,  # [Hkv, G, >= blocks in use * LANES] float32, written up to length
):
    """Estimated dot products of every query head with every key of its KV head."""
    Hkv, G, padded = queries.shape
    W = words.shape[2]
    per_word = padded // W
    mask = np.uint32((1 << bits) - 1)
    middle = np.float32((1 << bits) - 1) / np.float32(2)
    blocks = (length + LANES - 1) // LANES
    runs = (blocks + 7) // 8  # eight blocks a task: small enough to balance
    for task in numba.prange(Hkv * runs):
        h = task // runs
        low = np.empty(LANES, np.float32)
        high = np.empty(LANES, np.float32)
        acc = np.empty((G, LANES), np.float32)
        shift = np.empty(G, np.float32)
        for g in range(G):
            total = np.float32(0)
            for d in range(padded):
                total += queries[h, g, d]
            shift[g] = total * middle
        first = (task % runs) * 8
        for block in range(first, min(first + 8, blocks)):
            acc[:] = 0
            for w in range(W):
                code = words[h, block, w]
                for j in range(0, per_word, 2):
                    at = np.uint32(bits * j)
                    after = np.uint32(bits * j + bits)
                    for i in range(LANES):
                        low[i] = np.float32(np.int32((code[i] >> at) & mask))
                        high[i] = np.float32(np.int32((code[i] >> after) & mask))
                    for g in range(G):
                        a = acc[g]
                        x = queries[h, g, w * per_word + j]
                        y = queries[h, g, w * per_word + j + 1]
                        for i in range(LANES):
                            a[i] += x * low[i] + y * high[i]
            base = block * LANES
            factor = factors[h, base : base + LANES]
            for g in range(G):
                out = scores[h, g, base : base + LANES]
                for i in range(LANES):
                    out[i] = (acc[g, i] - shift[g]) * factor[i]
