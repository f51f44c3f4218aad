"""Attention of one new token of each sequence over rows of K and V on the GPU, split over keys.

A program handles one KV head of one sequence and one split of its keys, for all query heads of the
group (FlashDecoding). Splits are partial results; `merge.merge_splits` joins them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.rows import RowTable, head_of
from nearfar.gpu_kernels.types import power_of_two, triton_type

BLOCK_KEYS = 64
LEAST_HEADS = 16  # a matrix product on tensor cores has at least as many rows


@triton.jit
def _attend(
    query,  # [B, Hq, D]
    addresses,  # [B] int64
    head_strides,  # [B] int64
    lengths,  # [B] int32
    out,  # [B, Hq, S, D] float32, written
    lse,  # [B, Hq, S] float32, written
    scale,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    FIRST: tl.constexpr,
    ROW_TYPE: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) // Hkv
    h = tl.program_id(0) % Hkv
    s = tl.program_id(1)
    length = tl.load(lengths + b)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    start = s * part
    stop = tl.minimum(start + part, length)
    rows = head_of(addresses, head_strides, b, h, ROW_TYPE)
    g = tl.arange(0, HEADS)
    d = tl.arange(0, DIMS)
    heads = b * Hkv * G + h * G + g
    inside = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(query + heads[:, None] * D + d[None, :], mask=inside, other=0.0).to(ROW_TYPE)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    mass = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, DIMS), tl.float32)
    for first in range(start, stop, BLOCK):
        i = first + tl.arange(0, BLOCK)
        there = (i < stop)[:, None] & (d < D)[None, :]
        row = rows + i.to(tl.int64)[:, None] * (2 * D) + d[None, :]
        k = tl.load(row, mask=there, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where((i < stop)[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp(top - higher)
        p = tl.exp(logits - higher[:, None])
        v = tl.load(row + D, mask=there, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(ROW_TYPE), v, input_precision="ieee")
        mass = mass * shrink + tl.sum(p, 1)
        top = higher
    some = mass > 0
    share = tl.where(some, 1.0 / tl.where(some, mass, 1.0), 0.0)
    at = heads * S + FIRST + s
    tl.store(out + at[:, None] * D + d[None, :], acc * share[:, None], mask=inside)
    total = tl.where(some, top + tl.log(tl.where(some, mass, 1.0)), float("-inf"))
    tl.store(lse + at, total, mask=g < G)


def attend_rows(
    query: Tensor,
    rows: RowTable,
    lengths: Tensor,
    scale: float,
    splits: int,
    out: Tensor,
    lse: Tensor,
    first: int = 0,
) -> None:
    """Attention of ``query`` [B, Hq, D], in the type of the rows, over their first ``lengths`` [B].

    ``out`` [B, Hq, S, D] and ``lse`` [B, Hq, S] float32 get one partial result for each of the
    ``splits``, from place ``first`` on; a split without keys is out 0, lse -inf. Logits are
    multiplied by ``scale``.
    """
    B, Hq, S, D = out.shape
    Hkv = rows.heads
    _attend[(B * Hkv, splits)](
        query,
        rows.addresses,
        rows.head_strides,
        lengths,
        out,
        lse,
        scale,
        Hkv=Hkv,
        G=Hq // Hkv,
        D=D,
        S=S,
        SPLITS=splits,
        FIRST=first,
        ROW_TYPE=triton_type(rows.dtype),
        HEADS=power_of_two(Hq // Hkv, LEAST_HEADS),
        DIMS=power_of_two(D, 16),
        BLOCK=BLOCK_KEYS if D <= 128 else BLOCK_KEYS // 2,
        num_warps=4,
        num_stages=3,
    )


def attend_rows_reference(
    query: Tensor,
    rows: RowTable,
    lengths: Tensor,
    scale: float,
    splits: int,
    out: Tensor,
    lse: Tensor,
    first: int = 0,
) -> None:
    """`attend_rows` in plain tensor code, all keys in the first split."""
    B, Hq, _, D = out.shape
    out[:, :, first : first + splits] = 0.0
    lse[:, :, first : first + splits] = -torch.inf
    for b in range(B):
        length = int(lengths[b])
        keys = rows.tensors[b][:, :length, :D].float()
        values = rows.tensors[b][:, :length, D:].float()
        grouped = query[b].float().view(len(keys), -1, D)
        logits = grouped @ keys.transpose(1, 2) * scale
        if length:
            lse[b, :, first] = logits.logsumexp(-1).view(-1)
            out[b, :, first] = (logits.softmax(-1) @ values).view(Hq, D)
