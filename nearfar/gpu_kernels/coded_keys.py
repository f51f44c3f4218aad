"""Codes of 1 to 4 bits a dimension on the GPU: their layout, and writing them.

Layout. A key's code is `bytes_per_key` bytes side by side; byte c holds the dimensions c P to c P +
P - 1 of P = 8 // bits, lowest first, each in 8 // P bits (3 take the room of 4). The highest bit is
flipped: with a sign, a byte is 128 less than its levels say (`code_scores`). docs/retrieval.md
explains code, factor and estimate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.types import power_of_two

ALIGNED_KEYS = 1024  # capacities are multiples of this: a tile is read whole


def dims_per_byte(bits: int) -> int:
    """Dimensions P in one byte."""
    return 8 // bits


def bytes_per_key(head_dim: int, bits: int) -> int:
    """Bytes of one key's code, a multiple of 16."""
    return -(-head_dim // (dims_per_byte(bits) * 16)) * 16


@triton.jit
def _write(
    keys,  # [Hkv, n, D]
    mean,  # [Hkv, D] float32
    rotation,  # [D, D] float32
    codes,  # [Hkv, capacity, W] uint8, written from key `first` on
    factors,  # [Hkv, capacity], written
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
        packed |= tl.where((r < D)[None, :], level.to(tl.int32) << (8 // P * j), 0)
    base = codes + h * code_head_stride + (first + i).to(tl.int64)[:, None] * W
    packed = (packed ^ 128).to(tl.uint8)
    tl.store(base + c[None, :], packed, mask=(i < n)[:, None] & (c < W)[None, :])
    factor = tl.where(along > 0, square / tl.where(along > 0, along, 1.0), 0.0)
    factor = tl.minimum(factor, 65504.0).to(factors.dtype.element_ty)  # what a half can hold
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

    ``codes`` [Hkv, capacity, W] uint8 and ``factors`` [Hkv, capacity] float16 are written from key
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
    factors[:, first : first + n] = factor.where(along > 0, 0.0).clamp_max(65504.0)
    padded = torch.zeros(Hkv, n, W * P, dtype=torch.int32, device=keys.device)
    padded[..., :D] = level.int()
    shifts = torch.arange(P, dtype=torch.int32, device=keys.device) * (8 // P)
    words = (padded.view(Hkv, n, W, P) << shifts).sum(-1, dtype=torch.int32)
    codes[:, first : first + n] = (words ^ 128).to(torch.uint8)
