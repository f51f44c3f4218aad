"""Codes of 1 to 4 bits per dimension: their layout, writing them, and scoring them for queries.

Layout. Keys are stored in blocks of BLOCK_KEYS. Within a block the same word of all its keys is
contiguous: words [Hkv, blocks, W, BLOCK_KEYS] uint32, so that keys are scored side by side in
vector lanes. A word holds 32 / bits dimensions in fields of `bits`: dimension 4 s + j of a word is
the field at bit 8 j + bits s. Shifted by bits s and masked, a word is the four bytes of dimensions
4 s to 4 s + 3. One instruction multiplies them with the same four of an int8 query. 3 bits are two
planes: first words of the high bit of each level, 32 dimensions each, then words of the two low
bits.

A query is rounded to int8, in steps of 1/127 of each head's largest coordinate. The resulting error
of a score is a twentieth of that of a 4-bit code.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from nearfar.cpu_kernels.compile import kernel, serial
from nearfar.cpu_kernels.sketch_scan import BLOCK_KEYS, score_block

RUN_BLOCKS = 16  # blocks that a thread scores at a time
RUN_KEYS = RUN_BLOCKS * BLOCK_KEYS


def high_words(head_dim: int, bits: int) -> int:
    """Words of one key's high plane, which only codes of 3 bits have."""
    return -(-head_dim // 32) if bits == 3 else 0


def words_per_key(head_dim: int, bits: int) -> int:
    """Words W of one key's code."""
    low_bits = 2 if bits == 3 else bits
    return high_words(head_dim, bits) + -(-head_dim * low_bits // 32)


def round_queries(
    queries: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """``queries`` [Hkv, G, D] as int8, padded to whole words, and the scale of each [Hkv, G]."""
    Hkv, G, D = queries.shape
    scales = np.maximum(np.abs(queries).max(2), np.float32(1e-30)) / np.float32(127)
    rounded = np.zeros((Hkv, G, -(-D // 32) * 32), np.int8)
    rounded[..., :D] = np.rint(queries / scales[..., None])
    return rounded, scales.astype(np.float32)


@serial
def write_plane(levels, shift, bits, words, first, lane):
    """Write `bits` of ``levels`` [D] uint8 from bit `shift` on into ``words[first:, lane]``."""
    D = levels.shape[0]
    per_word = 32 // bits
    mask = np.uint32((1 << bits) - 1)
    for w in range((D + per_word - 1) // per_word):
        word = np.uint32(0)
        for i in range(min(per_word, D - w * per_word)):
            field = np.uint32(levels[w * per_word + i] >> shift) & mask
            word |= field << np.uint32(8 * (i % 4) + bits * (i // 4))
        words[first + w, lane] = word


@kernel
def write_codes(
    y,  # [n, D] float32: centred and rotated keys of one KV head
    first,  # position of y[0] among the head's keys
    bits,
    step,  # width of a level, in units of the root mean square of a key's coordinates
    words,  # [blocks, W, BLOCK_KEYS] uint32, written
    factors,  # [blocks * BLOCK_KEYS] float32, written
):
    """Quantise ``y`` to the levels 0 .. 2^bits - 1, centred on zero, and write codes and factors.

    The factor of a key is |y|^2 / (y . levels), with levels centred, so that the estimated dot
    product of y with a parallel vector is right (Gao and Long, RaBitQ, arXiv 2405.12497).
    """
    n, D = y.shape
    highest = np.float32((1 << bits) - 1)
    middle = highest / np.float32(2)
    half = np.float32((1 << bits) // 2)
    high = (D + 31) // 32 if bits == 3 else 0
    blocks = (first + n - 1) // BLOCK_KEYS - first // BLOCK_KEYS + 1
    # threads own whole blocks, so that no two write to the same cache line
    for b in numba.prange(blocks):
        block = first // BLOCK_KEYS + b
        start = max(block * BLOCK_KEYS - first, 0)
        stop = min((block + 1) * BLOCK_KEYS - first, n)
        levels = np.empty(D, np.uint8)
        for i in range(start, stop):
            lane = (first + i) % BLOCK_KEYS
            square = np.float32(0)
            for d in range(D):
                square += y[i, d] * y[i, d]
            width = max(np.sqrt(square / np.float32(D)) * np.float32(step), np.float32(1e-30))
            along = np.float32(0)
            for d in range(D):
                level = min(max(np.floor(y[i, d] / width + half), np.float32(0)), highest)
                along += y[i, d] * (level - middle)
                levels[d] = np.uint8(level)
            if high > 0:
                write_plane(levels, 2, 1, words[block], 0, lane)
                write_plane(levels, 0, 2, words[block], high, lane)
            else:
                write_plane(levels, 0, bits, words[block], 0, lane)
            factors[first + i] = square / along if along > 0 else np.float32(0)


@serial
def score_run(
    words,  # [blocks, W, BLOCK_KEYS] uint32 of one KV head
    factors,  # [blocks * BLOCK_KEYS] float32
    queries,  # [G, D padded] int8
    scales,  # [G] float32
    bits,
    first,  # block
    stop,
    scores,  # [G, RUN_KEYS] float32, written
):
    """Estimated dot products of a KV head's queries with the keys of a few blocks."""
    G, padded = queries.shape
    high = padded // 32 if bits == 3 else 0
    middle = np.float32((1 << bits) - 1) / np.float32(2)
    shifts = np.empty(G, np.float32)
    for g in range(G):
        total = np.int32(0)
        for d in range(padded):
            total += queries[g, d]
        shifts[g] = np.float32(total) * middle * scales[g]
    for block in range(first, stop):
        for g in range(0, G, 4):
            at = (block - first) * BLOCK_KEYS
            score_block(words, block, factors, queries, scales, shifts, g, bits, high, scores, at)


@kernel
def score_codes(
    words,  # [Hkv, blocks, W, BLOCK_KEYS] uint32
    factors,  # [Hkv, capacity] float32
    queries,  # [Hkv, G, D padded] int8, from `round_queries`
    scales,  # [Hkv, G] float32, the same
    length,
    bits,
    scores,  # [Hkv, G, >= length] float32, written up to length
):
    """Estimated dot products of every query head with every key of its KV head."""
    Hkv, G, _ = queries.shape
    blocks = (length + BLOCK_KEYS - 1) // BLOCK_KEYS
    runs = (blocks + RUN_BLOCKS - 1) // RUN_BLOCKS
    for task in numba.prange(Hkv * runs):
        h = task // runs
        first = task % runs * RUN_BLOCKS
        stop = min(first + RUN_BLOCKS, blocks)
        own = np.empty((G, RUN_KEYS), np.float32)
        score_run(words[h], factors[h], queries[h], scales[h], bits, first, stop, own)
        start = first * BLOCK_KEYS
        count = min(stop * BLOCK_KEYS, length) - start
        for g in range(G):
            scores[h, g, start : start + count] = own[g, :count]
