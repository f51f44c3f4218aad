"""Scores of all coded keys of a layer for all query heads, on tensor cores.

Bytes of codes are multiplied as they are, and under masks, with the multipliers that
`rotated_query_planes` makes. docs/retrieval.md explains the estimate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.rows import RowTable, head_of
from nearfar.gpu_kernels.types import INTERPRETED

TILE_KEYS = 128


@triton.jit
def _lowest(codes, MASK: tl.constexpr, INTERPRETED: tl.constexpr):
    """The lowest bits of a tile of codes."""
    if MASK == 255:
        return codes
    if INTERPRETED:
        return codes & MASK
    SPREAD: tl.constexpr = MASK * 0x01010101
    # four bytes in a register at once
    return tl.inline_asm_elementwise(
        f"and.b32 $0, $1, {SPREAD};", "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _exp2(x, INTERPRETED: tl.constexpr):
    """2^x, or 0 where that is no normal number."""
    if INTERPRETED:
        return tl.exp2(x)
    # one instruction, where Triton keeps what is too small to matter with four
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _load_codes(codes, i, c, W: tl.constexpr, C: tl.constexpr):
    """Codes of the keys ``i``; those between length and capacity are read and not used."""
    at = codes + (i[:, None] * W + c[None, :])
    if W == C:
        return tl.load(at)
    return tl.load(at, mask=(c < W)[None, :], other=0)


@triton.jit
def _score(
    planes,  # [B, Hkv, P, 2 HEADS, C] int8
    sums,  # [B, Hq, 2] float32
    code_addresses,  # [B] int64: of uint8 [Hkv, capacity_b, W]
    code_strides,  # [B] int64
    factor_addresses,  # [B] int64: of float16 [Hkv, capacity_b]
    factor_strides,  # [B] int64
    lengths,  # [B] int32
    scores,  # [B, Hkv, G, capacity], written up to the end of the length's tile
    peaks,  # [B, Hkv, G, segments, 2] float32, written: largest, and mass relative to it
    capacity,
    segments,
    temper,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    HEADS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    segment = tl.program_id(0)
    b = tl.program_id(1) // Hkv
    h = tl.program_id(1) % Hkv
    # a return where there are no keys would make the others wait for the length first
    length = tl.load(lengths + b)
    codes = head_of(code_addresses, code_strides, b, h, tl.int8)
    factors = head_of(factor_addresses, factor_strides, b, h, tl.float16)
    g = tl.arange(0, HEADS)
    c = tl.arange(0, C)
    head = (b * Hkv + h) * G + g
    unit = tl.load(sums + head * 2, mask=g < G, other=0.0)
    offset = unit * tl.load(sums + head * 2 + 1, mask=g < G, other=0.0)
    plane = planes + (b * Hkv + h) * (P * 2 * HEADS * C)
    plane += tl.arange(0, 2 * HEADS)[None, :] * C + c[:, None]
    multipliers = ()
    for j in tl.static_range(P):
        multipliers += (tl.load(plane + j * (2 * HEADS * C)),)  # type: ignore[assignment]
    start = segment * SEGMENT
    slope = temper * 1.4426950408889634
    # below any score, and small enough that rounding `NONE * slope` moves no exponent by much
    NONE: tl.constexpr = -1e5
    # every place of a folded tile keeps a maximum and a mass of its own: they are joined at the end
    top = tl.full((BLOCK // FOLD, HEADS), NONE, tl.float32)
    mass = tl.zeros((BLOCK // FOLD, HEADS), tl.float32)
    # within a segment, places are small numbers
    codes += start.to(tl.int64) * W
    factors += start
    written = scores + (head.to(tl.int64) * capacity + start)[None, :]
    number = tl.minimum(SEGMENT, length - start)
    for first in tl.range(0, number, BLOCK, num_stages=STAGES):
        i = first + tl.arange(0, BLOCK)
        code = _load_codes(codes, i, c, W, C)
        factor = tl.load(factors + i).to(tl.float32)
        acc = tl.zeros((BLOCK, 2 * HEADS), tl.int32)
        for j in tl.static_range(P):
            part = _lowest(code, (1 << 8 // P * (j + 1)) - 1, INTERPRETED)
            acc = tl.dot(part, multipliers[j], acc, out_dtype=tl.int32)
        high, low = tl.split(tl.reshape(acc, (BLOCK, HEADS, 2)))
        score = (high * 256 + low).to(tl.float32) * unit[None, :] - offset[None, :]
        # what half precision can hold; logits are smaller in any model
        score = tl.clamp(score * factor[:, None], -65504.0, 65504.0)
        tl.store(written + i[:, None], score.to(scores.dtype.element_ty), mask=(g < G)[None, :])
        if first + BLOCK > number:
            score = tl.where((i < number)[:, None], score, NONE)
        score = tl.reshape(score, (FOLD, BLOCK // FOLD, HEADS))
        higher = tl.maximum(top, tl.max(score, 0))
        mass *= _exp2((top - higher) * slope, INTERPRETED)
        mass += tl.sum(_exp2(score * slope - (higher * slope)[None, :, :], INTERPRETED), 0)
        top = higher
    highest = tl.max(top, 0)
    total = tl.sum(mass * _exp2((top - highest[None, :]) * slope, INTERPRETED), 0)
    at = (head * segments + segment) * 2
    known = g < tl.where(number > 0, G, 0)
    tl.store(peaks + at, highest * temper, mask=known)
    tl.store(peaks + at + 1, total, mask=known)


def score_codes(
    planes: Tensor,
    sums: Tensor,
    codes: RowTable,
    factors: RowTable,
    lengths: Tensor,
    temper: float,
    segment_keys: int,
    scores: Tensor,
    peaks: Tensor,
) -> None:
    """Estimated dot products of every query head with every key of its KV head.

    ``planes`` and ``sums`` are those of `turned_queries.turn_queries`; ``codes`` has arrays
    [Hkv, capacity_b, W] uint8 of each sequence, ``factors`` [Hkv, capacity_b] float16, of which the
    first ``lengths`` [B] keys count; capacities are multiples of ALIGNED_KEYS. ``scores``
    [B, Hkv, G, capacity] are written up to the length in their type, and what follows within a
    segment may be too; the capacity is whole segments, these whole tiles. ``peaks``
    [B, Hkv, G, segments, 2] float32 get, for each ``segment_keys`` keys, the largest
    temper * score and the sum of exp(temper * score - largest). Segments without keys have none
    written.
    """
    B, Hkv, G, capacity = scores.shape
    P, columns, C = planes.shape[2:]
    segments = peaks.shape[3]
    _score[(segments, B * Hkv)](
        planes,
        sums,
        codes.addresses,
        codes.head_strides,
        factors.addresses,
        factors.head_strides,
        lengths,
        scores,
        peaks,
        capacity,
        segments,
        temper,
        Hkv=Hkv,
        G=G,
        W=codes.width,
        C=C,
        P=P,
        HEADS=columns // 2,
        SEGMENT=segment_keys,
        BLOCK=TILE_KEYS,
        FOLD=4,
        STAGES=3,
        INTERPRETED=INTERPRETED,
        num_warps=2,
        num_stages=1,
    )


def score_codes_reference(
    planes: Tensor,
    sums: Tensor,
    codes: RowTable,
    factors: RowTable,
    lengths: Tensor,
    temper: float,
    segment_keys: int,
    scores: Tensor,
    peaks: Tensor,
) -> None:
    """`score_codes` in plain tensor code, float64."""
    B, Hkv, G, _ = scores.shape
    P, columns, C = planes.shape[2:]
    halves = planes.double().view(B, Hkv, P, columns // 2, 2, C)[:, :, :, :G]
    multiplier = halves[..., 0, :] * 256 + halves[..., 1, :]
    shifts = torch.arange(P, device=planes.device, dtype=torch.int32) * (8 // P)
    # t_j is the sum of the multipliers from the j-th on
    whole = multiplier.flip(2).cumsum(2).flip(2)
    query = (whole * 2.0 ** shifts.view(P, 1, 1)).permute(0, 1, 3, 4, 2).flatten(3)
    unit, shift = sums.double().view(B, Hkv, G, 2).unbind(-1)
    excess = shift + 128 * whole[:, :, -1].sum(-1)
    for b in range(B):
        length = int(lengths[b])
        words = codes.tensors[b][:, :length].int() ^ 128
        levels = ((words[..., None] >> shifts) & (2 ** (8 // P) - 1)).flatten(2).double()
        exact = query[b, :, :, : levels.shape[2]] @ levels.transpose(1, 2) - excess[b, :, :, None]
        exact *= unit[b, :, :, None] * factors.tensors[b][:, None, :length]
        scores[b, :, :, :length] = exact
        for segment in range(-(-length // segment_keys)):
            part = exact[:, :, segment * segment_keys : (segment + 1) * segment_keys] * temper
            top = part.amax(-1)
            peaks[b, :, :, segment, 0] = top
            peaks[b, :, :, segment, 1] = torch.exp(part - top[..., None]).sum(-1)
