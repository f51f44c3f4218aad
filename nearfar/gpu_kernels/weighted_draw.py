"""From scores of all keys to a random selection in proportion to weight, without a sort.

    weigh   scores -> weights w, and the sum of min(1, c w) at a ladder of constants c
    draw    the constant for which that sum is the budget, from the ladder;
            every key decides by a random number of its own; those drawn are packed, in
            two lists: for the host to read, and for the GPU to fetch from the host itself

A row is a set of query heads that share a selection: a KV group, or one head. The ladder stands for
the iteration that `cpu_kernels.draw` makes over all weights: constants double from the budget on,
and between two of them c is the mean of a lower and an upper bound. That moves the expected number
of keys by a few in a hundred; each key is drawn with exactly the probability that its log-weight
says, so sums stay unbiased. The ladder is added up in integers, so that the order in which programs
finish changes nothing and the same seed draws the same keys.

Scores and weights are read and written to the end of their segment: loads and stores whose mask may
end anywhere are made one number at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.types import INTERPRETED, power_of_two
from nearfar.records import DrawnKeys

LADDER = 16  # constants: the last is 2^15 times the budget
LADDER_UNIT = 2.0**-32  # of the sums in a ladder
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
def _at_most_one(a, b, INTERPRETED: tl.constexpr):
    """min(1, a b) of numbers that are not negative."""
    if INTERPRETED:
        return tl.minimum(a * b, 1.0)
    # one instruction, where Triton makes two
    return tl.inline_asm_elementwise(
        "mul.rn.sat.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _weigh(
    scores,  # [R, G, capacity]
    peaks,  # [R, G, segments, 2] float32
    lengths,  # [B] int32
    wanted,  # [B] int32
    weights,  # [R, capacity] float32, written
    ladder,  # [R, LADDER] int64, added to
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
    INTERPRETED: tl.constexpr,
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
    LOG2_E: tl.constexpr = 1.4426950408889634
    # a key's share of its head is 2^(slope score - start)
    slope = temper * LOG2_E
    start = tl.where(g < G, top * LOG2_E + tl.log2(tl.where(g < G, mass, 1.0) * G), float("inf"))
    n = tl.maximum(tl.load(wanted + row // ROWS) // SHARE, 1).to(tl.float32)
    constant = tl.exp2(tl.arange(0, LADDER).to(tl.float32)) * n
    read = tl.zeros((LADDER,), tl.float32)
    for first in range(0, SEGMENT, TILE):
        i = segment * SEGMENT + first + tl.arange(0, TILE)
        at = scores + heads.to(tl.int64)[:, None] * capacity + i[None, :]
        score = tl.load(at, mask=(g < G)[:, None], other=0.0).to(tl.float32)
        total = tl.sum(tl.exp2(score * slope - start[:, None]), 0)
        total = tl.where(i < length, total, 0.0)
        tl.store(weights + row.to(tl.int64) * capacity + i, total)
        read += tl.sum(_at_most_one(constant[:, None], total[None, :], INTERPRETED), 1)
    at = ladder + row * LADDER + tl.arange(0, LADDER)
    tl.atomic_add(at, (read * (1.0 / UNIT)).to(tl.int64), sem="relaxed")


@triton.jit
def _constant(ladder, n, LADDER: tl.constexpr, UNIT: tl.constexpr):
    """The c for which min(1, c w) sums to about ``n``."""
    j = tl.arange(0, LADDER)
    rungs = n * tl.exp2(j.to(tl.float32))
    read = tl.load(ladder + j).to(tl.float32) * UNIT
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
    small = tl.minimum(small, n * (1 << LADDER))
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
    ladder,  # [R, LADDER] int64
    lengths,  # [B] int32
    wanted,  # [B] int32
    steps,  # [B] int32
    seed,
    layer,
    reach,  # [B] int32
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
    weight = tl.load(weights + row.to(tl.int64) * capacity + i)
    number = tl.load(wanted + b)
    n = tl.maximum(number // SHARE, 1).to(tl.float32)
    constant = _constant(ladder + row * LADDER, n, LADDER, UNIT)
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
        mine = tl.where((segment + 1) * SEGMENT <= tl.load(reach + b), mine, 0)
        number -= mine
        tl.store(fetched + here * ROOM + place - number, pair, mask=drawn & (place >= number))
        tl.store(fetched_counts + here, mine)
        tl.store(counts + here * 2 + 1, mine)
    else:
        tl.store(counts + here * 2 + 1, 0)
    tl.store(chosen + here * SEGMENT + place, pair, mask=drawn & (place < number))
    tl.store(counts + here * 2, number)


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
    `code_scores.score_codes`; sequences are R / B rows each, and the capacity is whole segments.
    ``weights`` [R, capacity] float32 are written up to ``lengths`` [B], with zeros to the end of a
    segment. To ``ladder`` [R, LADDER] int64 is added, for every constant c = 2^j ``wanted`` [B] /
    ``share``, the sum of min(1, c w) over the weights, in units of LADDER_UNIT.
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
        UNIT=LADDER_UNIT,
        INTERPRETED=INTERPRETED,
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
        ladder,
        lengths,
        wanted,
        steps,
        fold_seed(seed),
        layer,
        drawn.reach,
        drawn.share,
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
        LADDER=LADDER,
        UNIT=LADDER_UNIT,
        num_warps=4 if segment_keys <= 2048 else 8,
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
    for r in range(R):
        length = int(lengths[r // rows])
        weight = (scores[r, :, :length].float() * temper).softmax(-1).mean(0)
        weights[r, :length] = weight
        weights[r, length : -(-length // segment_keys) * segment_keys] = 0.0
        number = max(int(wanted[r // rows]) // share, 1)
        constants = number * torch.exp2(torch.arange(LADDER, device=scores.device).double())
        read = (constants[:, None] * weight.double()).clamp_max(1.0).sum(1)
        ladder[r] += (read / LADDER_UNIT).long()


def draw_keys_reference(
    weights: Tensor,
    ladder: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    share: int,
    steps: Tensor,
    seed: int,
    layer: int,
    drawn: DrawnKeys,
) -> None:
    """`draw_keys` in plain tensor code: the constant by iteration over all weights, no ladder."""
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
            mine = len(pairs) * int(drawn.share[r // rows]) + segment * 101 % SHARE_UNIT
            mine = min(mine // SHARE_UNIT, room)
            if (segment + 1) * size > int(drawn.reach[r // rows]):
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
