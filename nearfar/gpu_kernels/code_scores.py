"""Scores of all coded keys of a layer for all query heads, on tensor cores.

A query is 16-bit integers relative to its largest coordinate, multiplied as two 8-bit halves side
by side with the levels of the codes, so sums are exact. For the layout of codes see `coded_keys`,
for what a score estimates docs/retrieval.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.coded_keys import bytes_per_key, dims_per_byte
from nearfar.gpu_kernels.rows import RowTable, head_of
from nearfar.gpu_kernels.types import INTERPRETED, power_of_two

FULL_SCALE = 32512.0  # 127 * 256: the largest coordinate of a query


def plane_shape(head_dim: int, bits: int, group: int) -> tuple[int, int, int]:
    """Shape (P, C, 2 H) of a KV group's query: planes, bytes and halves of heads, padded.

    A product of 8-bit integers has at least 32 terms, and eight columns.
    """
    bytes_padded = power_of_two(bytes_per_key(head_dim, bits), 32)
    return dims_per_byte(bits), bytes_padded, 2 * power_of_two(group, 4)


@triton.jit
def _turn(
    query,  # [B Hq, D] float32
    rotation,  # [D, D] float32
    planes,  # [B Hkv, P, C, 2 HEADS] int8, written
    sums,  # [B Hq, 2] float32, written
    G: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    FULL: tl.constexpr,
):
    group = tl.program_id(0) // HEADS
    g = tl.program_id(0) % HEADS
    i = tl.arange(0, P * C)
    d = tl.arange(0, DIMS)
    j, c = i // C, i % C
    r = c * P + j  # row of the rotation: coordinate of the turned query
    head = group * G + g
    # a padded head is zeros
    q = tl.load(query + head * D + d, mask=d < tl.where(g < G, D, 0), other=0.0)
    row = tl.load(
        rotation + r[:, None] * D + d[None, :],
        mask=(r < D)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    turned = tl.sum(row * q[None, :], 1)
    size = tl.maximum(tl.max(tl.abs(turned), 0), 1e-30)
    whole = tl.floor(turned * (FULL / size) + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    at = planes + (group * (P * C) + i) * (2 * HEADS) + 2 * g
    tl.store(at, high.to(tl.int8))
    tl.store(at + 1, (whole - high * 256).to(tl.int8))
    if g < G:
        tl.store(sums + head * 2, size / FULL)
        tl.store(sums + head * 2 + 1, tl.sum(whole, 0).to(tl.float32))


def turn_queries(query: Tensor, rotation: Tensor, planes: Tensor, sums: Tensor) -> None:
    """Turn ``query`` [B, Hq, D] float32 by ``rotation`` into the planes that codes are scored with.

    ``planes`` [B, Hkv, P, C, 2 H] int8 (see `plane_shape`) get the turned query in units of its
    largest coordinate / FULL_SCALE as high and low bytes, 256 high + low, of each head; ``sums``
    [B, Hq, 2] float32 that unit and the sum of a head's coordinates in it.
    """
    B, Hq, D = query.shape
    Hkv, P, C, columns = planes.shape[1:]
    _turn[(B * Hkv * columns // 2,)](
        query,
        rotation,
        planes,
        sums,
        G=Hq // Hkv,
        D=D,
        DIMS=power_of_two(D, 16),
        P=P,
        C=C,
        HEADS=columns // 2,
        FULL=FULL_SCALE,
        num_warps=4,
    )


def turn_queries_reference(query: Tensor, rotation: Tensor, planes: Tensor, sums: Tensor) -> None:
    """`turn_queries` in plain tensor code."""
    B, Hq, D = query.shape
    Hkv, P, C, columns = planes.shape[1:]
    turned = torch.zeros(B, Hkv, columns // 2, C * P, device=query.device)
    turned[:, :, : Hq // Hkv, :D] = (query @ rotation.T).view(B, Hkv, -1, D)
    size = turned.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    whole = (turned * (FULL_SCALE / size) + 0.5).floor().int()
    high = (whole + 128) >> 8
    halves = torch.stack([high, whole - high * 256], -1).view(B, Hkv, columns // 2, C, P, 2)
    planes.copy_(halves.permute(0, 1, 4, 3, 2, 5).reshape(planes.shape))
    real = slice(0, Hq // Hkv)
    sums[..., 0] = (size[:, :, real, 0] / FULL_SCALE).reshape(B, Hq)
    sums[..., 1] = whole[:, :, real].sum(-1).reshape(B, Hq)


@triton.jit
def _plane(codes, SHIFT: tl.constexpr, MASK: tl.constexpr, INTERPRETED: tl.constexpr):
    """The dimensions of a tile of codes that are ``SHIFT`` bits up in their bytes."""
    if INTERPRETED:
        return ((codes >> SHIFT) & MASK).to(tl.int8)
    # four bytes in a register at once; what a shift brings in from the next byte is masked out
    SPREAD: tl.constexpr = MASK * 0x01010101
    return tl.inline_asm_elementwise(
        f"shr.b32 $0, $1, {SHIFT}; and.b32 $0, $0, {SPREAD};",
        "=r,r",
        [codes],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _load_codes(codes, i, c, W: tl.constexpr, C: tl.constexpr):
    """Codes of the keys ``i``; what lies between length and capacity is read and not used."""
    at = codes + i.to(tl.int64)[:, None] * W + c[None, :]
    if W == C:
        return tl.load(at)
    return tl.load(at, mask=(c < W)[None, :], other=0)


@triton.jit
def _score(
    planes,  # [B, Hkv, P, C, 2 HEADS] int8
    sums,  # [B, Hq, 2] float32
    code_addresses,  # [B] int64: of uint8 [Hkv, capacity_b, W]
    code_strides,  # [B] int64
    factor_addresses,  # [B] int64: of float16 [Hkv, capacity_b]
    factor_strides,  # [B] int64
    lengths,  # [B] int32
    scores,  # [B, Hkv, G, capacity], written up to the length
    peaks,  # [B, Hkv, G, segments, 2] float32, written: largest, and mass relative to it
    capacity,
    segments,
    temper,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
    HEADS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    segment = tl.program_id(0)
    b = tl.program_id(1) // Hkv
    h = tl.program_id(1) % Hkv
    length = tl.load(lengths + b)
    start = segment * SEGMENT
    if start >= length:
        return
    codes = head_of(code_addresses, code_strides, b, h, tl.uint8)
    factors = head_of(factor_addresses, factor_strides, b, h, tl.float16)
    LEVELS: tl.constexpr = 1 << BITS
    g = tl.arange(0, HEADS)
    c = tl.arange(0, C)
    column = tl.arange(0, 2 * HEADS)
    plane = planes + (b * Hkv + h) * (P * C * 2 * HEADS)
    plane += c[:, None] * (2 * HEADS) + column[None, :]
    head = (b * Hkv + h) * G + g
    size = tl.load(sums + head * 2, mask=g < G, other=0.0)
    # levels are centred on zero: half their range is too much in every coordinate
    shift = tl.load(sums + head * 2 + 1, mask=g < G, other=0.0) * ((LEVELS - 1) / 2)
    # every place of a tile keeps a maximum and a mass of its own: they are joined once, at the end
    top = tl.full((BLOCK, HEADS), -1e30, tl.float32)
    mass = tl.zeros((BLOCK, HEADS), tl.float32)
    stop = tl.minimum(start + SEGMENT, length)
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES):
        i = first + tl.arange(0, BLOCK)
        code = _load_codes(codes, i, c, W, C)
        acc = tl.zeros((BLOCK, 2 * HEADS), tl.int32)
        for j in tl.static_range(P):
            levels = _plane(code, j * BITS, LEVELS - 1, INTERPRETED)
            query = tl.load(plane + j * (C * 2 * HEADS))
            acc = tl.dot(levels, query, acc, out_dtype=tl.int32)
        high, low = tl.split(tl.reshape(acc, (BLOCK, HEADS, 2)))
        whole = (high * 256 + low).to(tl.float32) - shift[None, :]
        score = whole * (tl.load(factors + i).to(tl.float32)[:, None] * size[None, :])
        there = (i < length)[:, None]
        at = head.to(tl.int64)[None, :] * capacity + i[:, None]
        # what half precision can hold; logits are smaller in any model
        score = tl.minimum(tl.maximum(score, -65504.0), 65504.0)
        kept = score.to(scores.dtype.element_ty)
        tl.store(scores + at, kept, mask=there & (g < G)[None, :])
        score = tl.where(there, score * temper, -1e30)
        higher = tl.maximum(top, score)
        mass = mass * tl.exp(top - higher) + tl.exp(score - higher)
        top = higher
    highest = tl.max(top, 0)
    total = tl.sum(mass * tl.exp(top - highest[None, :]), 0)
    at = (head * segments + segment) * 2
    tl.store(peaks + at, highest, mask=g < G)
    tl.store(peaks + at + 1, total, mask=g < G)


def score_codes(
    planes: Tensor,
    sums: Tensor,
    codes: RowTable,
    factors: RowTable,
    lengths: Tensor,
    bits: int,
    temper: float,
    segment_keys: int,
    scores: Tensor,
    peaks: Tensor,
) -> None:
    """Estimated dot products of every query head with every key of its KV head.

    ``planes`` and ``sums`` are those of `turn_queries`; ``codes`` has arrays [Hkv, capacity_b, W]
    uint8 of each sequence, ``factors`` [Hkv, capacity_b] float16, of which the first ``lengths``
    [B] keys count; capacities are multiples of ALIGNED_KEYS. ``scores`` [B, Hkv, G, capacity] are
    written up to the length in their type; ``peaks`` [B, Hkv, G, segments, 2] float32 get, for each
    ``segment_keys`` keys, the largest temper * score and the sum of exp(temper * score - largest).
    Segments without keys are left as they are.
    """
    B, Hkv, G, capacity = scores.shape
    P, C, columns = planes.shape[2:]
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
        W=codes.tensors[0].shape[2],
        C=C,
        P=P,
        BITS=bits,
        HEADS=columns // 2,
        SEGMENT=segment_keys,
        BLOCK=256,
        STAGES=2,
        INTERPRETED=INTERPRETED,
        num_warps=4,
        num_stages=1,
    )


def score_codes_reference(
    planes: Tensor,
    sums: Tensor,
    codes: RowTable,
    factors: RowTable,
    lengths: Tensor,
    bits: int,
    temper: float,
    segment_keys: int,
    scores: Tensor,
    peaks: Tensor,
) -> None:
    """`score_codes` in plain tensor code, float32."""
    B, Hkv, G, _ = scores.shape
    P, C, columns = planes.shape[2:]
    halves = planes.float().view(B, Hkv, P, C, columns // 2, 2)
    whole = halves[..., 0] * 256 + halves[..., 1]
    query = whole.permute(0, 1, 4, 3, 2).reshape(B, Hkv, columns // 2, C * P)[:, :, :G]
    query = query * sums[..., 0].view(B, Hkv, G, 1)
    for b in range(B):
        length = int(lengths[b])
        words = codes.tensors[b][:, :length].int()
        shifts = torch.arange(P, device=words.device, dtype=torch.int32) * bits
        levels = ((words[..., None] >> shifts) & (2**bits - 1)).flatten(2).float()
        z = levels - (2**bits - 1) / 2
        factor = factors.tensors[b][:, None, :length]
        exact = query[b, :, :, : z.shape[2]] @ z.transpose(1, 2) * factor
        scores[b, :, :, :length] = exact
        for segment in range(-(-length // segment_keys)):
            part = exact[:, :, segment * segment_keys : (segment + 1) * segment_keys] * temper
            top = part.amax(-1)
            peaks[b, :, :, segment, 0] = top
            peaks[b, :, :, segment, 1] = torch.exp(part - top[..., None]).sum(-1)
