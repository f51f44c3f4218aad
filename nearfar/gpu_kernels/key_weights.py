"""From scores of all keys to weights, and to the number of keys for any sampling constant.

    weigh   scores -> weights w, and the sum of min(1, c w) at a budget curve of constants c

A row is a set of query heads that share a selection: a KV group, or one head. The weight of a key
is the mean over its heads. Constants double from the budget on, so that the one for which the sum
is the budget lies between two of them (`weighted_draw`). The budget curve is added up in integers,
so that the order in which programs finish changes nothing.

Scores and weights are read and written to the end of their segment: loads and stores whose mask may
end anywhere are made one number at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.types import INTERPRETED, power_of_two

CURVE_POINTS = 16  # constants: the last is 2^15 times the budget
CURVE_UNIT = 2.0**-32  # of the sums in a budget curve


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
    budget_curve,  # [R, CURVE_POINTS] int64, added to
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
    CURVE_POINTS: tl.constexpr,
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
    constant = tl.exp2(tl.arange(0, CURVE_POINTS).to(tl.float32)) * n
    read = tl.zeros((CURVE_POINTS,), tl.float32)
    for first in range(0, SEGMENT, TILE):
        i = segment * SEGMENT + first + tl.arange(0, TILE)
        at = scores + heads.to(tl.int64)[:, None] * capacity + i[None, :]
        score = tl.load(at, mask=(g < G)[:, None], other=0.0).to(tl.float32)
        total = tl.sum(tl.exp2(score * slope - start[:, None]), 0)
        total = tl.where(i < length, total, 0.0)
        tl.store(weights + row.to(tl.int64) * capacity + i, total)
        read += tl.sum(_at_most_one(constant[:, None], total[None, :], INTERPRETED), 1)
    at = budget_curve + row * CURVE_POINTS + tl.arange(0, CURVE_POINTS)
    tl.atomic_add(at, (read * (1.0 / UNIT)).to(tl.int64), sem="relaxed")


def weigh_keys(
    scores: Tensor,
    peaks: Tensor,
    segment_keys: int,
    lengths: Tensor,
    wanted: Tensor,
    share: int,
    temper: float,
    weights: Tensor,
    budget_curve: Tensor,
) -> None:
    """Mean over a row's heads of softmax(temper * scores), and its budget curve.

    ``scores`` [R, G, capacity] and ``peaks`` [R, G, segments, 2] are, for segments of
    ``segment_keys``, those of
    `code_scores.score_codes`; sequences are R / B rows each, and the capacity is whole segments.
    ``weights`` [R, capacity] float32 are written up to ``lengths`` [B], with zeros to the end of a
    segment. To ``budget_curve`` [R, CURVE_POINTS] int64 is added, for every constant c = 2^j
    ``wanted`` [B] / ``share``, the sum of min(1, c w) over the weights, in units of CURVE_UNIT.
    """
    R, G, capacity = scores.shape
    segments = peaks.shape[2]
    _weigh[(segments, R)](
        scores,
        peaks,
        lengths,
        wanted,
        weights,
        budget_curve,
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
        CURVE_POINTS=CURVE_POINTS,
        UNIT=CURVE_UNIT,
        INTERPRETED=INTERPRETED,
        num_warps=4 if segment_keys <= 1024 else 8,
    )


def weigh_keys_reference(
    scores: Tensor,
    peaks: Tensor,
    segment_keys: int,
    lengths: Tensor,
    wanted: Tensor,
    share: int,
    temper: float,
    weights: Tensor,
    budget_curve: Tensor,
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
        constants = number * torch.exp2(torch.arange(CURVE_POINTS, device=scores.device).double())
        read = (constants[:, None] * weight.double()).clamp_max(1.0).sum(1)
        budget_curve[r] += (read / CURVE_UNIT).long()
