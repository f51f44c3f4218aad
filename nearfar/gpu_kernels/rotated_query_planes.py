"""The queries of a step as multipliers of codes on tensor cores.

A tensor core multiplies 8-bit integers, but a byte of a code holds P dimensions. They are not
unpacked: with l_j the level of its j-th dimension and s the bits between two, the byte is the sum
of 2^(s j) l_j, and P masks leave its lowest term, two terms, and so on to the whole. The
multipliers of these P numbers are t_j - t_(j+1), where t_j is the query's coordinate j over 2^(s
j).

Multipliers are 16-bit integers, taken as two 8-bit halves side by side, so sums are exact. For the
layout of codes see `coded_keys`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.coded_keys import bytes_per_key, dims_per_byte
from nearfar.gpu_kernels.types import power_of_two

FULL_SCALE = 32512.0  # 127 * 256: the largest multiplier


def plane_shape(head_dim: int, bits: int, group: int) -> tuple[int, int, int]:
    """Shape (P, 2 H, C) of a KV group's query: planes, halves of heads and bytes, padded.

    A product of 8-bit integers has at least 32 terms, and eight columns.
    """
    bytes_padded = power_of_two(bytes_per_key(head_dim, bits), 32)
    return dims_per_byte(bits), 2 * power_of_two(group, 4), bytes_padded


def _largest_coordinate(P: int) -> float:
    """Units of a coordinate for which the difference of two stays within FULL_SCALE."""
    return FULL_SCALE / (1 + 2.0 ** -(8 // P))


@triton.jit
def _turn(
    query,  # [B Hq, D] float32
    rotation,  # [D, D] float32
    planes,  # [B Hkv, P, 2 HEADS, C] int8, written
    sums,  # [B Hq, 2] float32, written
    middle,
    full,
    G: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
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
    weight = 1 << (8 // P * j)  # of a dimension in its byte
    whole = tl.floor(turned * (full / size) / weight + 0.5).to(tl.int32)
    k = tl.arange(0, P)
    after = (k[:, None] + 1 == k[None, :])[:, :, None]
    following = tl.sum(tl.where(after, tl.reshape(whole, (P, C))[None, :, :], 0), 1)
    multiplier = whole - tl.reshape(following, (P * C,))
    high = (multiplier + 128) >> 8
    at = planes + ((group * P + j) * HEADS + g) * (2 * C) + c
    tl.store(at, high.to(tl.int8))
    tl.store(at + C, (multiplier - high * 256).to(tl.int8))
    if g < G:
        # what levels of `middle` give, and a byte that is read with a sign
        shift = middle * tl.sum(whole * weight, 0) - 128 * tl.sum(tl.where(j == P - 1, whole, 0), 0)
        tl.store(sums + head * 2, size / full)
        tl.store(sums + head * 2 + 1, shift)


def quantise_queries(
    query: Tensor, rotation: Tensor, bits: int, planes: Tensor, sums: Tensor
) -> None:
    """Turn ``query`` [B, Hq, D] float32 by ``rotation`` into the planes that codes are scored with.

    ``planes`` [B, Hkv, P, 2 H, C] int8 (see `plane_shape`) get the multipliers of each head as high
    and low bytes, 256 high + low; ``sums`` [B, Hq, 2] float32 get the unit of these integers, and
    the term to subtract from the sum of all products, because levels are centred on zero.
    """
    B, Hq, D = query.shape
    Hkv, P, columns, C = planes.shape[1:]
    _turn[(B * Hkv * columns // 2,)](
        query,
        rotation,
        planes,
        sums,
        (2**bits - 1) / 2,
        _largest_coordinate(P),
        G=Hq // Hkv,
        D=D,
        DIMS=power_of_two(D, 16),
        P=P,
        C=C,
        HEADS=columns // 2,
        num_warps=4,
    )


def turn_queries_reference(
    query: Tensor, rotation: Tensor, bits: int, planes: Tensor, sums: Tensor
) -> None:
    """`quantise_queries` in plain tensor code."""
    B, Hq, D = query.shape
    Hkv, P, columns, C = planes.shape[1:]
    turned = torch.zeros(B, Hkv, columns // 2, C * P, device=query.device)
    turned[:, :, : Hq // Hkv, :D] = (query @ rotation.T).view(B, Hkv, -1, D)
    size = turned.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    weight = 2 ** (8 // P * torch.arange(P, device=query.device))
    turned = (turned * (_largest_coordinate(P) / size)).unflatten(-1, (C, P))
    whole = (turned / weight + 0.5).floor().int()
    multiplier = whole.clone()
    multiplier[..., :-1] -= whole[..., 1:]
    high = (multiplier + 128) >> 8
    halves = torch.stack([high, multiplier - high * 256], 3)  # [B, Hkv, H, 2, C, P]
    planes.copy_(halves.flatten(2, 3).permute(0, 1, 4, 2, 3))
    shift = (2**bits - 1) / 2 * (whole * weight).sum((-2, -1)) - 128 * whole[..., -1].sum(-1)
    real = slice(0, Hq // Hkv)
    sums[..., 0] = (size[:, :, real, 0] / _largest_coordinate(P)).reshape(B, Hq)
    sums[..., 1] = shift[:, :, real].reshape(B, Hq)
