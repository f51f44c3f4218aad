"""From projections to attention's inputs in one pass: query and key norm, rotation, rows.

The product of a token's hidden state with the fused weight is a run of heads: queries, keys,
values. Keys and values go to their row. Queries are rotated in place; if far memory is read, a
second copy for the host and its index is float32 and scaled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.rows import RowTable, head_of
from nearfar.gpu_kernels.types import power_of_two, triton_type


@triton.jit
def _rotated(
    x, first, second, at, inside, cos, sin, norm, eps, D: tl.constexpr, NORM: tl.constexpr
):
    """Both halves of a tile of heads [T, D / 2], normalised and turned, in float32."""
    low = tl.load(x + first, mask=inside, other=0.0)
    high = tl.load(x + second, mask=inside, other=0.0)
    kind = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
        low *= scale * tl.load(norm + first, mask=first < D // 2, other=0.0).to(tl.float32)
        high *= scale * tl.load(norm + second, mask=first < D // 2, other=0.0).to(tl.float32)
        low, high = low.to(kind).to(tl.float32), high.to(kind).to(tl.float32)
    # the first half of `sin` is negated
    turned = low * tl.load(cos + at + first, mask=inside, other=0.0)
    turned += high * tl.load(sin + at + first, mask=inside, other=0.0)
    other = high * tl.load(cos + at + second, mask=inside, other=0.0)
    other += low * tl.load(sin + at + second, mask=inside, other=0.0)
    return turned, other


@triton.jit
def _place(
    qkv,  # [T, (Hq + 2 Hkv) D]
    cos,  # [T, D] float32
    sin,
    q_norm,  # [D]
    k_norm,
    addresses,  # [B] int64
    head_strides,  # [B] int64
    slots,  # [T] int32
    query,  # [T, Hq, D], written
    asked,  # [T, Hq, D] float32, written: scaled
    told,  # the same, where the host reads it
    T,
    scale,
    eps,
    Hq: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens; 1 where each is of a sequence of its own
    EACH: tl.constexpr,  # whether it is
    ROW_TYPE: tl.constexpr,
    NORM: tl.constexpr,
    ASKED: tl.constexpr,
    TOLD: tl.constexpr,
):
    head = tl.program_id(1)
    t = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    first = tl.arange(0, HALF)[None, :]
    second = first + D // 2
    inside = (t < T) & (first < D // 2)
    x = qkv + t * ((Hq + 2 * Hkv) * D) + head * D
    if head < Hq:
        low, high = _rotated(x, first, second, t * D, inside, cos, sin, q_norm, eps, D, NORM)
        at = (t * Hq + head) * D
        kind = query.dtype.element_ty
        tl.store(query + at + first, low.to(kind), mask=inside)
        tl.store(query + at + second, high.to(kind), mask=inside)
        low = low.to(kind).to(tl.float32) * scale
        high = high.to(kind).to(tl.float32) * scale
        if ASKED:
            tl.store(asked + at + first, low, mask=inside)
            tl.store(asked + at + second, high, mask=inside)
        if TOLD:
            tl.store(told + at + first, low, mask=inside)
            tl.store(told + at + second, high, mask=inside)
    else:
        b = tl.program_id(0) if EACH else 0
        row = head_of(addresses, head_strides, b, (head - Hq) % Hkv, ROW_TYPE)
        row += tl.load(slots + t, mask=t < T, other=0).to(tl.int64) * (2 * D)
        if head < Hq + Hkv:
            low, high = _rotated(x, first, second, t * D, inside, cos, sin, k_norm, eps, D, NORM)
            tl.store(row + first, low.to(ROW_TYPE), mask=inside)
            tl.store(row + second, high.to(ROW_TYPE), mask=inside)
        else:
            early = tl.load(x + first, mask=inside, other=0.0)
            late = tl.load(x + second, mask=inside, other=0.0)
            tl.store(row + D + first, early.to(ROW_TYPE), mask=inside)
            tl.store(row + D + second, late.to(ROW_TYPE), mask=inside)


def place_tokens(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rows: RowTable,
    slots: Tensor,
    query: Tensor,
    scale: float,
    asked: Tensor | None = None,
    told: Tensor | None = None,
) -> None:
    """Write K and V of T tokens to slots [T] int32 of their rows, and their rotated queries.

    ``qkv`` is [T, (Hq + 2 Hkv) D]; ``angles`` are cosines and sines [T, D] float32 as
    `rope.Rotary.angles` makes them; ``norms`` the RMSNorm weights [D] of queries and keys, if any.
    ``rows`` has as many sequences as tokens, or one that all tokens are of. ``query`` [T, Hq, D] is
    written; ``asked`` and ``told`` [T, Hq, D] float32, if given, get the queries times ``scale``,
    the latter in memory that the host reads.
    """
    T, Hq, D = query.shape
    sequences = rows.count
    assert sequences in (1, T)
    Hkv = (qkv.shape[1] // D - Hq) // 2
    block = 1 if sequences == T else 32
    _place[(triton.cdiv(T, block), Hq + 2 * Hkv)](
        qkv,
        angles[0],
        angles[1],
        qkv if norms is None else norms[0],
        qkv if norms is None else norms[1],
        rows.addresses,
        rows.head_strides,
        slots,
        query,
        query if asked is None else asked,
        query if told is None else told,
        T,
        scale,
        eps,
        Hq=Hq,
        Hkv=Hkv,
        D=D,
        HALF=power_of_two(D // 2),
        BLOCK=block,
        EACH=sequences == T,
        ROW_TYPE=triton_type(rows.dtype),
        NORM=norms is not None,
        ASKED=asked is not None,
        TOLD=told is not None,
        num_warps=1 if block == 1 else 4,
    )


def place_tokens_reference(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rows: RowTable,
    slots: Tensor,
    query: Tensor,
    scale: float,
    asked: Tensor | None = None,
    told: Tensor | None = None,
) -> None:
    """`place_tokens` in plain tensor code."""
    T, Hq, D = query.shape
    heads = qkv.view(T, -1, D)
    Hkv = (heads.shape[1] - Hq) // 2
    q, k, v = heads.split([Hq, Hkv, Hkv], dim=1)
    if norms is not None:
        q = F.rms_norm(q.float(), (D,), norms[0].float(), eps).to(q.dtype)
        k = F.rms_norm(k.float(), (D,), norms[1].float(), eps).to(k.dtype)

    def turned(x: Tensor) -> Tensor:
        wide = x.float()
        return wide * angles[0][:, None] + wide.roll(D // 2, -1) * angles[1][:, None]

    query.copy_(turned(q))
    for copy in (asked, told):
        if copy is not None:
            copy.copy_(query.float() * scale)
    both = torch.cat([turned(k), v.float()], -1)
    for t in range(T):
        place = rows.tensors[t if len(rows.tensors) == T else 0]
        place[:, int(slots[t])] = both[t].to(rows.dtype)
