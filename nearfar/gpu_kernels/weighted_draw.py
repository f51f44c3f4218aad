"""From scores of all keys to a random selection in proportion to weight, without a sort.

    weigh   scores -> weights, and how much weight lies below a ladder of thresholds
    draw    the constant c for which min(1, c w) sums to the budget, from that ladder;
            every key decides by a random number of its own; those drawn are packed

A row is a set of query heads that share a selection: a KV group, or one head. The ladder stands for
the iteration that `cpu_kernels.draw` makes over all weights: thresholds halve from 1 / budget on,
and between two of them c is the mean of a lower and an upper bound. That moves the expected number
of keys by a few in a hundred; each key is drawn with exactly the probability that its log-weight
says, so sums stay unbiased. The ladder is added up in integers, so that the order in which programs
finish changes nothing and the same seed draws the same keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.types import power_of_two

LADDER = 16  # thresholds: the last is 2^-15 / budget
WEIGHT_UNIT = 2.0**-40  # of the weights in a ladder


@triton.jit
def hash32(x):
    """Two multiply-xorshift rounds over uint32."""
    x ^= x >> 16
    x = x * 0x7FEB352D
    x ^= x >> 15
    x = x * 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _weigh(
    scores,  # [R, G, capacity]
    peaks,  # [R, G, segments, 2] float32
    lengths,  # [B] int32
    wanted,  # [B] int32
    weights,  # [R, capacity] float32, written up to the length
    ladder,  # [R, 2, LADDER] int64, added to
    capacity,
    segments,
    temper,
    ROWS: tl.constexpr,  # rows of a sequence
    G: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    PEAKS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    LADDER: tl.constexpr,
    UNIT: tl.constexpr,
):
    segment = tl.program_id(0)
    row = tl.program_id(1)
    length = tl.load(lengths + row // ROWS)
    if segment * SEGMENT >= length:
        return
    used = tl.cdiv(length, SEGMENT)
    g = tl.arange(0, HEADS)
    heads = row * G + g
    top = tl.full((HEADS,), -1e30, tl.float32)
    mass = tl.zeros((HEADS,), tl.float32)
    for first in range(0, used, PEAKS):
        s = first + tl.arange(0, PEAKS)
        at = peaks + (heads[:, None] * segments + s[None, :]) * 2
        inside = (g < G)[:, None] & (s < used)[None, :]
        peak = tl.load(at, mask=inside, other=-1e30)
        part = tl.load(at + 1, mask=inside, other=0.0)
        higher = tl.maximum(top, tl.max(peak, 1))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(peak - higher[:, None]) * part, 1)
        top = higher
    top = tl.where(g < G, top, 0.0)
    share = tl.where(g < G, 1.0 / (tl.where(g < G, mass, 1.0) * G), 0.0)
    n = tl.maximum(tl.load(wanted + row // ROWS) // SHARE, 1).to(tl.float32)
    j = tl.arange(0, LADDER)
    threshold = tl.exp2(-j.to(tl.float32)) / n
    above = tl.zeros((LADDER,), tl.int32)
    below = tl.zeros((LADDER,), tl.float32)
    for first in range(0, SEGMENT, TILE):
        i = segment * SEGMENT + first + tl.arange(0, TILE)
        there = i < length
        at = scores + heads.to(tl.int64)[:, None] * capacity + i[None, :]
        score = tl.load(at, mask=(g < G)[:, None] & there[None, :], other=float("-inf"))
        score = score.to(tl.float32) * temper - top[:, None]
        total = tl.sum(tl.exp(score) * share[:, None], 0)
        total = tl.where(there, total, 0.0)
        tl.store(weights + row.to(tl.int64) * capacity + i, total, mask=there)
        heavy = total[None, :] >= threshold[:, None]
        # in this order: in the other the comparisons are kept, in three times the registers
        below += tl.sum(tl.where(heavy, 0.0, total[None, :]), 1)
        above += tl.sum(heavy.to(tl.int32), 1)
    at = ladder + row * (2 * LADDER) + j
    tl.atomic_add(at, above.to(tl.int64), sem="relaxed")
    tl.atomic_add(at + LADDER, (below * (1.0 / UNIT)).to(tl.int64), sem="relaxed")


@triton.jit
def _constant(ladder, n, LADDER: tl.constexpr, UNIT: tl.constexpr):
    """The c for which min(1, c w) sums to about ``n``."""
    j = tl.arange(0, LADDER)
    above = tl.load(ladder + j).to(tl.float32)
    below = tl.load(ladder + LADDER + j).to(tl.float32) * UNIT
    # what is read at c = 1 / threshold: all keys above it, and what the others add
    read = above + below * n * tl.exp2(j.to(tl.float32))
    rung = tl.maximum(tl.sum((read <= n).to(tl.int32), 0) - 1, 0)
    certain = tl.sum(tl.where(j == rung, above, 0.0), 0)
    rest = tl.sum(tl.where(j == rung, below, 0.0), 0)
    # no further key becomes certain: too small a c; a straight line to the next rung: too large
    # below the last rung almost nothing is left: a bound keeps rounding from reading all of it
    small = tl.minimum((n - certain) / tl.maximum(rest, 1e-37), n * (1 << LADDER))
    here = tl.sum(tl.where(j == rung, read, 0.0), 0)
    there = tl.sum(tl.where(j == rung + 1, read, 0.0), 0)
    start = n * tl.exp2(rung.to(tl.float32))
    large = start * (1.0 + (n - here) / tl.maximum(there - here, 1e-6))
    middle = tl.where(there > n, 0.5 * (small + tl.maximum(large, small)), small)
    return tl.maximum(middle, n)


@triton.jit
def row_key(seed, layer, step, row):
    """What seeds the random numbers of a row."""
    key = seed.to(tl.uint32)
    key = hash32(key * 0x9E3779B9 + layer.to(tl.uint32))
    key = hash32(key * 0x9E3779B9 + step.to(tl.uint32))
    return hash32(key * 0x9E3779B9 + row.to(tl.uint32))


@triton.jit(do_not_specialize=["seed", "layer"])
def _draw(
    weights,  # [R, capacity] float32
    ladder,  # [R, 2, LADDER] int64
    lengths,  # [B] int32
    wanted,  # [B] int32
    steps,  # [B] int32
    seed,
    layer,
    chosen,  # [R, segments, SEGMENT] int64, written
    counts,  # [R, segments] int32, written
    capacity,
    segments,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SHARE: tl.constexpr,
    LADDER: tl.constexpr,
    UNIT: tl.constexpr,
):
    segment = tl.program_id(0)
    row = tl.program_id(1)
    b = row // ROWS
    length = tl.load(lengths + b)
    if segment * SEGMENT >= length:
        return
    i = segment * SEGMENT + tl.arange(0, SEGMENT)
    there = i < length
    weight = tl.load(weights + row.to(tl.int64) * capacity + i, mask=there, other=0.0)
    number = tl.load(wanted + b)
    n = tl.maximum(number // SHARE, 1).to(tl.float32)
    constant = _constant(ladder + row * (2 * LADDER), n, LADDER, UNIT)
    probability = tl.minimum(constant * weight, 1.0)
    probability = tl.where(number >= length, 1.0, probability)
    key = row_key(tl.cast(seed, tl.int32), tl.cast(layer, tl.int32), tl.load(steps + b), row % ROWS)
    mixed = hash32((i.to(tl.uint32) * 0x9E3779B9) ^ key)
    uniform = (mixed >> 8).to(tl.float32) * 5.9604644775390625e-08
    drawn = (uniform < probability) & there
    # what the comparison with a number of 24 bits really lets through
    probability = tl.minimum(tl.ceil(probability * 16777216.0) * 5.9604644775390625e-08, 1.0)
    log_weight = -tl.log(tl.where(drawn, probability, 1.0))
    place = tl.cumsum(drawn.to(tl.int32), 0) - 1
    pair = log_weight.to(tl.int32, bitcast=True).to(tl.int64) << 32
    pair |= i.to(tl.int64)
    at = (row.to(tl.int64) * segments + segment) * SEGMENT + place
    tl.store(chosen + at, pair, mask=drawn)
    tl.store(counts + row * segments + segment, tl.sum(drawn.to(tl.int32), 0))


def weigh_keys(
    scores: Tensor,
    peaks: Tensor,
    segment_keys: int,
    lengths: Tensor,
    wanted: Tensor,
    share: int,
    temper: float,
    weights: Tensor,
    ladder: Tensor,
) -> None:
    """Mean over a row's heads of softmax(temper * scores), and its ladder.

    ``scores`` [R, G, capacity] and ``peaks`` [R, G, segments, 2] are, for segments of
    ``segment_keys``, those of
    `code_scores.score_codes`; sequences are R / B rows each. ``weights`` [R, capacity] float32 are
    written up to ``lengths`` [B]. To ``ladder`` [R, 2, LADDER] int64 is added, for every threshold
    2^-j ``share`` / ``wanted`` [B], how many keys are at or above it, and the weight of those below
    it in units of WEIGHT_UNIT.
    """
    R, G, capacity = scores.shape
    segments = peaks.shape[2]
    _weigh[(segments, R)](
        scores,
        peaks,
        lengths,
        wanted,
        weights,
        ladder,
        capacity,
        segments,
        temper,
        ROWS=R // len(lengths),
        G=G,
        SEGMENT=segment_keys,
        TILE=min(segment_keys, 2048),
        PEAKS=power_of_two(min(segments, 256)),
        HEADS=power_of_two(G),
        SHARE=share,
        LADDER=LADDER,
        UNIT=WEIGHT_UNIT,
        num_warps=4 if segment_keys <= 1024 else 8,
    )


def draw_keys(
    weights: Tensor,
    ladder: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    share: int,
    steps: Tensor,
    seed: int,
    layer: int,
    chosen: Tensor,
    counts: Tensor,
) -> None:
    """Draw about ``wanted`` [B] / ``share`` keys of each row, key i with probability min(1, c w_i).

    ``seed``, ``layer``, ``steps`` [B] int32 and the row seed the random numbers. For every
    segment of keys of a row, those drawn are written to the front of ``chosen`` [R, segments, keys
    of a segment] int64, ascending: the index in the low half, the bits of the float32 log-weight
    -log(probability) in the high half; ``counts`` [R, segments] int32 says how many. Where
    ``wanted`` is the length or more, all are. Both outputs may lie in pinned host memory. Segments
    without keys are left as they are.
    """
    R, capacity = weights.shape
    segments = counts.shape[1]
    _draw[(segments, R)](
        weights,
        ladder,
        lengths,
        wanted,
        steps,
        fold_seed(seed),
        layer,
        chosen,
        counts,
        capacity,
        segments,
        ROWS=R // len(lengths),
        SEGMENT=chosen.shape[2],
        SHARE=share,
        LADDER=LADDER,
        UNIT=WEIGHT_UNIT,
        num_warps=4 if chosen.shape[2] <= 2048 else 8,
    )


def fold_seed(seed: int) -> int:
    """``seed`` as a signed 32-bit number."""
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded - (folded >> 31 << 32)


def weigh_keys_reference(
    scores: Tensor,
    peaks: Tensor,
    segment_keys: int,
    lengths: Tensor,
    wanted: Tensor,
    share: int,
    temper: float,
    weights: Tensor,
    ladder: Tensor,
) -> None:
    """`weigh_keys` in plain tensor code; the peaks are not used."""
    R = len(scores)
    rows = R // len(lengths)
    steps = torch.arange(LADDER, device=scores.device)
    for r in range(R):
        length = int(lengths[r // rows])
        weight = (scores[r, :, :length].float() * temper).softmax(-1).mean(0)
        weights[r, :length] = weight
        number = max(int(wanted[r // rows]) // share, 1)
        above = weight >= (torch.exp2(-steps.float()) / number)[:, None]
        below = weight.double().expand_as(above).masked_fill(above, 0.0).sum(1)
        ladder[r, 0] += above.sum(1)
        ladder[r, 1] += (below / WEIGHT_UNIT).long()


def draw_keys_reference(
    weights: Tensor,
    ladder: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    share: int,
    steps: Tensor,
    seed: int,
    layer: int,
    chosen: Tensor,
    counts: Tensor,
) -> None:
    """`draw_keys` in plain tensor code: the constant by iteration over all weights, no ladder."""
    rows = len(weights) // len(lengths)
    for r in range(len(weights)):
        length, n = int(lengths[r // rows]), int(wanted[r // rows])
        number = n if n >= length else max(n // share, 1)
        probability = inclusion_probabilities(weights[r, :length], number)
        i = torch.arange(length, device=weights.device)
        key = row_key_reference(seed, layer, int(steps[r // rows]), r % rows)
        drawn = uniform_reference(i, key) < probability
        probability = (torch.ceil(probability * 2.0**24) * 2.0**-24).clamp_max(1.0)
        bits = (-probability.log()).view(torch.int32).long() << 32
        size = chosen.shape[2]
        for segment in range(-(-length // size)):
            part = slice(segment * size, min(length, (segment + 1) * size))
            pairs = (bits[part] | i[part])[drawn[part]]
            chosen[r, segment, : len(pairs)] = pairs
            counts[r, segment] = len(pairs)


def inclusion_probabilities(weights: Tensor, wanted: int) -> Tensor:
    """min(1, c w) [N] float32 with c such that they sum to ``wanted``; all 1 if that is >= N."""
    if wanted >= len(weights):
        return torch.ones_like(weights)
    certain = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        rest = weights.double()[~certain].sum().clamp_min(1e-300)
        constant = (wanted - int(certain.sum())) / rest
        more = weights.double() * constant >= 1
        if int(more.sum()) <= int(certain.sum()) or int(more.sum()) >= wanted:
            return (weights.double() * constant).clamp_max(1.0).float()
        certain = more


def row_key_reference(seed: int, layer: int, step: int, row: int) -> int:
    """What seeds the random numbers of a row, in Python's integers."""
    key = fold_seed(seed)
    for part in (layer, step, row):
        x = (key * 0x9E3779B9 + part) & 0xFFFFFFFF
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        key = x ^ (x >> 16)
    return key


def uniform_reference(counter: Tensor, key: int) -> Tensor:
    """The random numbers [N] float32 of positions ``counter`` under ``key``, in 64-bit integers."""
    full = 0xFFFFFFFF
    x = (counter.long() * 0x9E3779B9 & full) ^ (key & full)
    x ^= x >> 16
    x = x * 0x7FEB352D & full
    x ^= x >> 15
    x = x * 0x846CA68B & full
    x ^= x >> 16
    return (x >> 8).float() * 2.0**-24
