"""Attention over far rows that the GPU fetches from host memory itself.

The GPU's link and the host's cores can read host memory at the same time, so each takes a part of
the drawn keys (`weighted_draw.draw_keys`) and both finish sooner. Rows are read in place, from
registered memory, in their storage type: nothing is copied first.

A program handles one row of heads that select together and a run of segments, whose lists it joins:
a segment has few keys, and the first takes a microsecond over the link.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.decode_attention import LEAST_HEADS
from nearfar.gpu_kernels.rows import RowTable, head_of
from nearfar.gpu_kernels.types import power_of_two, triton_type
from nearfar.records import DrawnKeys
from nearfar.storage import SCALE_BITS, decode

BLOCK_KEYS = 32
PROGRAMS = 128  # about as many as a GPU has cores


@triton.jit
def _scales(items, d, SCALE_BITS: tl.constexpr):
    """The scale of each row of int8 items; see `nearfar.storage`."""
    bits = tl.where((d < SCALE_BITS)[None, :], (items.to(tl.int32) & 1) << d[None, :], 0)
    return (tl.sum(bits, 1) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _attend(
    query,  # [B, Hq, D]
    addresses,  # [B] int64
    head_strides,  # [B] int64
    fetched,  # [R, segments, ROOM] int64
    counts,  # [R, segments] int32
    lengths,  # [B] int32
    out,  # [B, Hq, S, D] float32, written from place FIRST on
    lse,  # [B, Hq, S] float32
    scale,
    segments,
    ROWS: tl.constexpr,  # rows of a sequence
    Hq: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    FIRST: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROOM: tl.constexpr,
    RUN: tl.constexpr,
    ROW_TYPE: tl.constexpr,
    MATH_TYPE: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    b = row // ROWS
    GR: tl.constexpr = Hq // ROWS  # heads of a row
    first_head = (row % ROWS) * GR
    rows = head_of(addresses, head_strides, b, first_head * Hkv // Hq, ROW_TYPE)
    used = tl.cdiv(tl.load(lengths + b), SEGMENT)
    run = tl.cdiv(used, tl.num_programs(1))
    first_segment = row.to(tl.int64) * segments + part * run
    s = tl.arange(0, RUN)
    count = tl.load(counts + first_segment + s, mask=(s < run) & (part * run + s < used), other=0)
    ends = tl.cumsum(count, 0)
    total = tl.sum(count, 0)
    g = tl.arange(0, HEADS)
    d = tl.arange(0, DIMS)
    heads = b * Hq + first_head + g
    inside = (g < GR)[:, None] & (d < D)[None, :]
    q = tl.load(query + heads[:, None] * D + d[None, :], mask=inside, other=0.0).to(MATH_TYPE)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    mass = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, DIMS), tl.float32)
    for first in range(0, total, BLOCK):
        e = first + tl.arange(0, BLOCK)
        there = e < total
        before = ends[None, :] <= e[:, None]
        segment = first_segment + tl.sum(before.to(tl.int32), 1)
        place = e - tl.sum(tl.where(before, count[None, :], 0), 1)
        pair = tl.load(fetched + segment * ROOM + place, mask=there, other=0)
        log_weight = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        row_at = rows + (pair & 0xFFFFFFFF)[:, None] * (2 * D) + d[None, :]
        read = there[:, None] & (d < D)[None, :]
        # both on their way before either is used
        k = tl.load(row_at, mask=read, other=0)
        v = tl.load(row_at + D, mask=read, other=0)
        if SCALE_BITS > 0:
            k_scale, v_scale = _scales(k, d, SCALE_BITS), _scales(v, d, SCALE_BITS)
        logits = tl.dot(q, tl.trans(k.to(MATH_TYPE)), input_precision="ieee") * scale
        if SCALE_BITS > 0:
            logits = logits * k_scale[None, :]
        logits = tl.where(there[None, :], logits + log_weight[None, :], float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp(top - higher)
        p = tl.exp(logits - higher[:, None])
        mass = mass * shrink + tl.sum(p, 1)
        if SCALE_BITS > 0:
            p = p * v_scale[None, :]
        mixed = tl.dot(p.to(MATH_TYPE), v.to(MATH_TYPE), input_precision="ieee")
        acc = acc * shrink[:, None] + mixed
        top = higher
    some = mass > 0
    share = tl.where(some, 1.0 / tl.where(some, mass, 1.0), 0.0)
    at = heads * S + FIRST + part
    tl.store(out + at[:, None] * D + d[None, :], acc * share[:, None], mask=inside)
    sum_exp = tl.where(some, top + tl.log(tl.where(some, mass, 1.0)), float("-inf"))
    tl.store(lse + at, sum_exp, mask=g < GR)


def fetch_parts(rows: int, device: torch.device) -> int:
    """Parts in which ``rows`` rows are read: a power of two, less one for another result."""
    programs = PROGRAMS if device.type == "cuda" else 2 * rows
    return max(1, power_of_two(triton.cdiv(programs, rows)) - 1)


def attend_fetched(
    query: Tensor,
    rows: RowTable,
    kv_heads: int,
    drawn: DrawnKeys,
    lengths: Tensor,
    scale: float,
    first: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attention of ``query`` [B, Hq, D] over the far rows that ``drawn`` has for the GPU.

    ``rows`` are tables of far rows [Hkv, capacity_b, 2 D] in a type of `nearfar.storage`, in
    memory that the GPU reads, with ``lengths`` [B] int32 of them in use; the rows of ``drawn``
    belong to the sequences and their heads in order. ``out`` [B, Hq, S, D] and ``lse`` [B, Hq, S]
    float32 get partial results from place ``first`` on, S - first of them; without keys out 0, lse
    -inf. Logits are multiplied by ``scale`` before the log-weight of a key is added.
    """
    B, Hq, S, D = out.shape
    R, segments, segment_keys = drawn.chosen.shape
    parts, stored = S - first, rows.dtype == torch.int8
    _attend[(R, parts)](
        query,
        rows.addresses,
        rows.head_strides,
        drawn.fetched,
        drawn.fetched_counts,
        lengths,
        out,
        lse,
        scale,
        segments,
        ROWS=R // B,
        Hq=Hq,
        Hkv=kv_heads,
        D=D,
        S=S,
        FIRST=first,
        SEGMENT=segment_keys,
        ROOM=drawn.fetched.shape[2],
        RUN=power_of_two(triton.cdiv(segments, parts)),
        ROW_TYPE=triton_type(rows.dtype),
        MATH_TYPE=triton_type(query.dtype if stored else rows.dtype),
        SCALE_BITS=SCALE_BITS if stored else 0,
        HEADS=power_of_two(Hq * B // R, LEAST_HEADS),
        DIMS=power_of_two(D, 16),
        BLOCK=BLOCK_KEYS,
        num_warps=4,
        num_stages=1,
    )


def attend_fetched_reference(
    query: Tensor,
    rows: RowTable,
    kv_heads: int,
    drawn: DrawnKeys,
    lengths: Tensor,
    scale: float,
    first: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`attend_fetched` in plain tensor code, all keys in the first place."""
    B, Hq, _, D = out.shape
    R, _, segment_keys = drawn.chosen.shape
    heads = Hq * B // R
    out[:, :, first:] = 0.0
    lse[:, :, first:] = -torch.inf
    for r in range(R):
        b, head = r * B // R, r % (R // B) * heads
        used = -(-int(lengths[b]) // segment_keys)
        lists = zip(drawn.fetched[r, :used], drawn.fetched_counts[r, :used].tolist(), strict=True)
        pairs = torch.cat([torch.empty(0, dtype=torch.int64), *(p[:n].cpu() for p, n in lists)])
        if not len(pairs):
            continue
        table = rows.tensors[b][head * kv_heads // Hq]
        picked = table[(pairs & 0xFFFFFFFF).to(table.device)].to(query.device)
        keys, values = decode(picked[:, :D]).double(), decode(picked[:, D:]).double()
        log_weights = (pairs >> 32).int().view(torch.float32).to(query.device)
        mine = slice(head, head + heads)
        logits = query[b, mine].double() @ keys.T * scale + log_weights
        lse[b, mine, first] = logits.logsumexp(-1).float()
        out[b, mine, first] = (logits.softmax(-1) @ values).float()
