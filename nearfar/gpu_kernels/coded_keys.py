"""Codes of 1 to 4 bits a dimension on the GPU: writing them, and scoring all of them.

Layout. A key's code is `bytes_per_key` bytes side by side; byte c holds the dimensions c P to
c P + P - 1 of P = 8 // bits, lowest bits first (3 bits take the room of 4). "Plane" j is the j-th
dimension of every byte. So four bytes at a time a shift and a mask turn a tile of codes into
integers that tensor cores multiply with the query's plane j. A query is 16-bit integers relative to
its largest coordinate, multiplied as two 8-bit halves side by side; sums are exact.

What a code and its factor are, and why the estimate is what it is: docs/retrieval.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.rows import RowTable, head_of
from nearfar.gpu_kernels.types import INTERPRETED, power_of_two

SEGMENT_KEYS = 1024  # keys whose heaviest score and mass are noted together
ALIGNED_KEYS = 1024  # capacities are multiples of this: a tile is read whole
FULL_SCALE = 32512.0  # 127 * 256: the largest coordinate of a query


def dims_per_byte(bits: int) -> int:
    """Dimensions P in one byte."""
    return 8 // bits


def bytes_per_key(head_dim: int, bits: int) -> int:
    """Bytes of one key's code, a multiple of 16."""
    return -(-head_dim // (dims_per_byte(bits) * 16)) * 16


def plane_shape(head_dim: int, bits: int, group: int) -> tuple[int, int, int]:
    """Shape (P, C, 2 H) of a KV group's query: planes, bytes and halves of heads, padded.

    A product of 8-bit integers has at least 32 terms, and eight columns.
    """
    bytes_padded = power_of_two(bytes_per_key(head_dim, bits), 32)
    return dims_per_byte(bits), bytes_padded, 2 * power_of_two(group, 4)


@triton.jit
def _write(
    keys,  # [Hkv, n, D]
    mean,  # [Hkv, D] float32
    rotation,  # [D, D] float32
    codes,  # [Hkv, capacity, W] uint8, written from key `first` on
    factors,  # [Hkv, capacity] float32, written
    n,
    first,
    key_head_stride,
    key_stride,
    code_head_stride,
    factor_head_stride,
    width,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    P: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIMS)
    inside = (i < n)[:, None] & (d < D)[None, :]
    at = keys + h * key_head_stride + i.to(tl.int64)[:, None] * key_stride + d[None, :]
    k = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    k -= tl.load(mean + h * D + d, mask=d < D, other=0.0)[None, :]
    k = tl.where(inside, k, 0.0)
    LEVELS: tl.constexpr = 1 << BITS
    MIDDLE: tl.constexpr = (LEVELS - 1) / 2
    square = tl.sum(k * k, 1)  # a rotation keeps lengths
    scale = tl.maximum(tl.sqrt(square / D) * width, 1e-30)[:, None]
    along = tl.zeros((BLOCK,), tl.float32)
    c = tl.arange(0, COLUMNS)
    packed = tl.zeros((BLOCK, COLUMNS), tl.int32)
    for j in tl.static_range(P):
        # coordinate r of the turned key is the product with row r of the rotation
        r = c * P + j
        turn = tl.load(
            rotation + r[None, :] * D + d[:, None],
            mask=(r < D)[None, :] & (d < D)[:, None],
            other=0.0,
        )
        y = tl.dot(k, turn, input_precision=PRECISION)
        level = tl.floor(y / scale + LEVELS // 2)
        level = tl.minimum(tl.maximum(level, 0.0), LEVELS - 1.0)
        along += tl.sum(tl.where((r < D)[None, :], y * (level - MIDDLE), 0.0), 1)
        packed |= tl.where((r < D)[None, :], level.to(tl.int32) << (BITS * j), 0)
    base = codes + h * code_head_stride + (first + i).to(tl.int64)[:, None] * W
    tl.store(base + c[None, :], packed.to(tl.uint8), mask=(i < n)[:, None] & (c < W)[None, :])
    factor = tl.where(along > 0, square / tl.where(along > 0, along, 1.0), 0.0)
    tl.store(factors + h * factor_head_stride + first + i, factor, mask=i < n)


def write_codes(
    keys: Tensor,
    mean: Tensor,
    rotation: Tensor,
    bits: int,
    width: float,
    first: int,
    codes: Tensor,
    factors: Tensor,
) -> None:
    """Encode ``keys`` [Hkv, n, D] less ``mean`` [Hkv, D], turned by ``rotation`` [D, D].

    ``codes`` [Hkv, capacity, W] uint8 and ``factors`` [Hkv, capacity] float32 are written from key
    ``first`` on. ``width`` is that of a level, in root mean squares of a key's coordinates.
    """
    Hkv, n, D = keys.shape
    block = 64
    _write[(Hkv, triton.cdiv(n, block))](
        keys,
        mean,
        rotation,
        codes,
        factors,
        n,
        first,
        keys.stride(0),
        keys.stride(1),
        codes.stride(0),
        factors.stride(0),
        width,
        D=D,
        DIMS=power_of_two(D, 16),
        W=codes.shape[2],
        BITS=bits,
        P=dims_per_byte(bits),
        COLUMNS=power_of_two(codes.shape[2], 16),
        BLOCK=block,
        # ten bits of mantissa: far below what a level of the code resolves
        PRECISION="tf32",
        num_warps=4,
    )


def write_codes_reference(
    keys: Tensor,
    mean: Tensor,
    rotation: Tensor,
    bits: int,
    width: float,
    first: int,
    codes: Tensor,
    factors: Tensor,
) -> None:
    """`write_codes` in plain tensor code, float32."""
    Hkv, n, D = keys.shape
    P, W, levels = dims_per_byte(bits), codes.shape[2], 2**bits
    y = (keys.float() - mean[:, None]) @ rotation.T
    square = y.square().sum(-1, keepdim=True)
    level = (y / ((square / D).sqrt() * width).clamp_min(1e-30) + levels // 2).floor()
    level = level.clamp(0, levels - 1)
    along = (y * (level - (levels - 1) / 2)).sum(-1)
    factor = square[..., 0] / along.where(along > 0, 1.0)
    factors[:, first : first + n] = factor.where(along > 0, 0.0)
    padded = torch.zeros(Hkv, n, W * P, dtype=torch.int32, device=keys.device)
    padded[..., :D] = level.int()
    shifts = torch.arange(P, dtype=torch.int32, device=keys.device) * bits
    words = (padded.view(Hkv, n, W, P) << shifts).sum(-1, dtype=torch.int32)
    codes[:, first : first + n] = words.to(torch.uint8)


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
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
):
    group = tl.program_id(0) // HEADS
    g = tl.program_id(0) % HEADS
    i = tl.arange(0, P * C)
    j, c = i // C, i % C
    r = c * P + j  # row of the rotation: coordinate of the turned query
    turned = tl.zeros((P * C,), tl.float32)
    head = group * G + g
    if g < G:
        for first in tl.static_range(0, DIMS, CHUNK):
            d = first + tl.arange(0, CHUNK)
            q = tl.load(query + head * D + d, mask=d < D, other=0.0)
            inside = (r < D)[:, None] & (d < D)[None, :]
            row = tl.load(rotation + r[:, None] * D + d[None, :], mask=inside, other=0.0)
            turned += tl.sum(row * q[None, :], 1)
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
        CHUNK=16,
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
def _score(
    planes,  # [B, Hkv, P, C, 2 HEADS] int8
    sums,  # [B, Hq, 2] float32
    code_addresses,  # [B] int64: of uint8 [Hkv, capacity_b, W]
    code_strides,  # [B] int64
    factor_addresses,  # [B] int64: of float32 [Hkv, capacity_b]
    factor_strides,  # [B] int64
    lengths,  # [B] int32
    scores,  # [B, Hkv, G, capacity] float32, written up to the length
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
    factors = head_of(factor_addresses, factor_strides, b, h, tl.float32)
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
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    mass = tl.zeros((HEADS,), tl.float32)
    for first in tl.range(start, tl.minimum(start + SEGMENT, length), BLOCK):
        i = first + tl.arange(0, BLOCK)
        there = (i < length)[:, None]
        at = codes + i.to(tl.int64)[:, None] * W + c[None, :]
        # what lies between the length and the capacity is read and not used
        if W == C:
            code = tl.load(at)
        else:
            code = tl.load(at, mask=(c < W)[None, :], other=0)
        acc = tl.zeros((BLOCK, 2 * HEADS), tl.int32)
        for j in tl.static_range(P):
            levels = _plane(code, j * BITS, LEVELS - 1, INTERPRETED)
            acc = tl.dot(levels, tl.load(plane + j * (C * 2 * HEADS)), acc)
        high, low = tl.split(tl.reshape(acc, (BLOCK, HEADS, 2)))
        whole = (high * 256 + low).to(tl.float32) - shift[None, :]
        score = whole * (tl.load(factors + i)[:, None] * size[None, :])
        at = head.to(tl.int64)[None, :] * capacity + i[:, None]
        tl.store(scores + at, score, mask=there & (g < G)[None, :])
        score = tl.where(there, score * temper, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(score - higher[None, :]), 0)
        top = higher
    at = (head * segments + segment) * 2
    tl.store(peaks + at, top, mask=g < G)
    tl.store(peaks + at + 1, mass, mask=g < G)


def score_codes(
    planes: Tensor,
    sums: Tensor,
    codes: RowTable,
    factors: RowTable,
    lengths: Tensor,
    bits: int,
    temper: float,
    scores: Tensor,
    peaks: Tensor,
) -> None:
    """Estimated dot products of every query head with every key of its KV head.

    ``planes`` and ``sums`` are those of `turn_queries`; ``codes`` has arrays [Hkv, capacity_b, W]
    uint8 of each sequence, ``factors`` [Hkv, capacity_b] float32, of which the first ``lengths``
    [B] keys count; capacities are multiples of ALIGNED_KEYS. ``scores`` [B, Hkv, G, capacity]
    float32 are written up to the length; ``peaks`` [B, Hkv, G, segments, 2] float32 get, for each
    SEGMENT_KEYS keys, the largest temper * score and the sum of exp(temper * score - largest).
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
        SEGMENT=SEGMENT_KEYS,
        BLOCK=256,
        INTERPRETED=INTERPRETED,
        num_warps=8,
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
        scores[b, :, :, :length] = query[b, :, :, : z.shape[2]] @ z.transpose(1, 2) * factor
        for segment in range(-(-length // SEGMENT_KEYS)):
            stop = min(length, (segment + 1) * SEGMENT_KEYS)
            part = scores[b, :, :, segment * SEGMENT_KEYS : stop] * temper
            top = part.amax(-1)
            peaks[b, :, :, segment, 0] = top
            peaks[b, :, :, segment, 1] = torch.exp(part - top[..., None]).sum(-1)
