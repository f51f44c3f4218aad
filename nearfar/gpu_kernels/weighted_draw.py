"""A random selection of keys in proportion to weight, without a sort.

    draw    the constant c for which the sum of min(1, c w) is the budget, from the budget curve of
            `key_weights`; every key decides by a random number of its own; those drawn are packed
            in two lists: for the host to read, and for the GPU to fetch from the host itself

The budget curve stands for the iteration that `cpu_kernels.draw` makes over all weights: between
two rungs c is the mean of a lower and an upper bound. That moves the expected number of keys by a
few in a hundred; each key is drawn with exactly the probability of its log-weight, so sums stay
unbiased, and the same seed draws the same keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.key_weights import CURVE_POINTS, CURVE_UNIT
from nearfar.records import DrawnKeys

SHARE_UNIT = 256  # parts of which the share that the GPU fetches is a number


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
def _constant(budget_curve, n, CURVE_POINTS: tl.constexpr, UNIT: tl.constexpr):
    """The c for which min(1, c w) sums to about ``n``."""
    j = tl.arange(0, CURVE_POINTS)
    rungs = n * tl.exp2(j.to(tl.float32))
    read = tl.load(budget_curve + j).to(tl.float32) * UNIT
    rung = tl.maximum(tl.sum((read <= n).to(tl.int32), 0) - 1, 0)
    # the sum grows ever more slowly: two rungs below, at and above where it is n bound it
    below = tl.sum(tl.where(j == rung - 1, read, 0.0), 0)
    here = tl.sum(tl.where(j == rung, read, 0.0), 0)
    there = tl.sum(tl.where(j == rung + 1, read, 0.0), 0)
    beyond = tl.sum(tl.where(j == rung + 2, read, 0.0), 0)
    at = tl.sum(tl.where(j == rung, rungs, 0.0), 0)
    step = tl.where(rung > 0, 0.5 * at, at)  # from the rung below, or from nothing
    small = at + (n - here) * step / tl.maximum(here - below, 1e-37)
    slower = 2.0 * at - (there - n) * (2.0 * at) / tl.maximum(beyond - there, 1e-37)
    small = tl.where(beyond > there, tl.maximum(small, slower), small)
    large = at + (n - here) * at / tl.maximum(there - here, 1e-37)
    # below the last rung almost nothing is left: a bound keeps rounding from reading all of it
    small = tl.minimum(small, n * (1 << CURVE_POINTS))
    middle = tl.where(there > n, 0.5 * (small + tl.maximum(large, small)), small)
    return tl.maximum(middle, n)


@triton.jit
def row_key(seed, layer, step, row):
    """The seed of the random numbers of a row."""
    key = seed.to(tl.uint32)
    key = hash32(key * 0x9E3779B9 + layer.to(tl.uint32))
    key = hash32(key * 0x9E3779B9 + step.to(tl.uint32))
    return hash32(key * 0x9E3779B9 + row.to(tl.uint32))


@triton.jit(do_not_specialize=["seed", "layer"])
def _draw(
    weights,  # [R, capacity] float32
    budget_curve,  # [R, CURVE_POINTS] int64
    lengths,  # [B] int32
    wanted,  # [B] int32
    steps,  # [B] int32
    seed,
    layer,
    readable_tokens,  # [B] int32
    fetching,  # [B] int32
    chosen,  # [R, segments, SEGMENT] int64, written
    counts,  # [R, segments, 2] int32, written
    fetched,  # [R, segments, ROOM] int64, written
    fetched_counts,  # [R, segments] int32, written
    capacity,
    segments,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROOM: tl.constexpr,
    SHARE_UNIT: tl.constexpr,
    SHARE: tl.constexpr,
    CURVE_POINTS: tl.constexpr,
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
    weight = tl.load(weights + row.to(tl.int64) * capacity + i)
    number = tl.load(wanted + b)
    n = tl.maximum(number // SHARE, 1).to(tl.float32)
    constant = _constant(budget_curve + row * CURVE_POINTS, n, CURVE_POINTS, UNIT)
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
    number = tl.sum(drawn.to(tl.int32), 0)
    here = row.to(tl.int64) * segments + segment
    if ROOM > 0:
        # rounded up or down by the segment, so that all together have their share
        mine = number * tl.load(fetching + b) + (segment * 101) % SHARE_UNIT
        mine = tl.minimum(mine // SHARE_UNIT, ROOM)
        mine = tl.where((segment + 1) * SEGMENT <= tl.load(readable_tokens + b), mine, 0)
        number -= mine
        tl.store(fetched + here * ROOM + place - number, pair, mask=drawn & (place >= number))
        tl.store(fetched_counts + here, mine)
        tl.store(counts + here * 2 + 1, mine)
    else:
        tl.store(counts + here * 2 + 1, 0)
    tl.store(chosen + here * SEGMENT + place, pair, mask=drawn & (place < number))
    tl.store(counts + here * 2, number)


def draw_keys(
    weights: Tensor,
    budget_curve: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    share: int,
    steps: Tensor,
    seed: int,
    layer: int,
    drawn: DrawnKeys,
) -> None:
    """Draw about ``wanted`` [B] / ``share`` keys of each row, key i with probability min(1, c w_i).

    ``seed``, ``layer``, ``steps`` [B] int32 and the row seed the random numbers. Those drawn are
    written to ``drawn`` with the log-weight -log(probability); where ``wanted`` is the length or
    more, all are. Of a segment that the GPU reaches as a whole it fetches its share, the last ones.
    Segments without keys are left as they are.
    """
    R, capacity = weights.shape
    _, segments, segment_keys = drawn.chosen.shape
    _draw[(segments, R)](
        weights,
        budget_curve,
        lengths,
        wanted,
        steps,
        fold_seed(seed),
        layer,
        drawn.readable_tokens,
        drawn.gpu_share,
        drawn.chosen,
        drawn.counts,
        drawn.fetched,
        drawn.fetched_counts,
        capacity,
        segments,
        ROWS=R // len(lengths),
        SEGMENT=segment_keys,
        ROOM=drawn.fetched.shape[2],
        SHARE_UNIT=SHARE_UNIT,
        SHARE=share,
        CURVE_POINTS=CURVE_POINTS,
        UNIT=CURVE_UNIT,
        num_warps=4 if segment_keys <= 2048 else 8,
    )


def fold_seed(seed: int) -> int:
    """``seed`` as a signed 32-bit number."""
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded - (folded >> 31 << 32)


def draw_keys_reference(
    weights: Tensor,
    budget_curve: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    share: int,
    steps: Tensor,
    seed: int,
    layer: int,
    drawn: DrawnKeys,
) -> None:
    """`draw_keys` in plain tensor code: iteration over all weights finds the constant."""
    rows = len(weights) // len(lengths)
    for r in range(len(weights)):
        length, n = int(lengths[r // rows]), int(wanted[r // rows])
        number = n if n >= length else max(n // share, 1)
        probability = inclusion_probabilities(weights[r, :length], number)
        i = torch.arange(length, device=weights.device)
        key = row_key_reference(seed, layer, int(steps[r // rows]), r % rows)
        taken = uniform_reference(i, key) < probability
        probability = (torch.ceil(probability * 2.0**24) * 2.0**-24).clamp_max(1.0)
        bits = (-probability.log()).view(torch.int32).long() << 32
        size = drawn.chosen.shape[2]
        room = drawn.fetched.shape[2]
        for segment in range(-(-length // size)):
            part = slice(segment * size, min(length, (segment + 1) * size))
            pairs = (bits[part] | i[part])[taken[part]]
            mine = len(pairs) * int(drawn.gpu_share[r // rows]) + segment * 101 % SHARE_UNIT
            mine = min(mine // SHARE_UNIT, room)
            if (segment + 1) * size > int(drawn.readable_tokens[r // rows]):
                mine = 0
            host = len(pairs) - mine
            drawn.chosen[r, segment, :host] = pairs[:host]
            drawn.counts[r, segment] = torch.tensor([host, mine])
            if room:
                drawn.fetched[r, segment, :mine] = pairs[host:]
                drawn.fetched_counts[r, segment] = mine


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
    """The seed of the random numbers of a row, in Python's integers."""
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
