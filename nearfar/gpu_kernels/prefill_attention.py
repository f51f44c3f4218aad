"""Exact causal attention of many prompt tokens, tiled, with the log-sum-exp of every query.

Online softmax over tiles of keys (FlashAttention, arXiv 2205.14135 and 2307.08691). The queries are
the last T of N tokens. This is the portable kernel. The runtime uses the vendor's library where
that is faster; `benchmarks/gpu_kernels.py` measures it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.types import power_of_two


@triton.jit
def _attend(
    queries,  # [Hq, T, D]
    keys,  # [Hkv, N, D]
    values,
    out,  # [Hq, T, D], written
    lse,  # [Hq, T] float32, written
    T,
    N,
    q_head_stride,
    q_stride,
    k_head_stride,
    k_stride,
    v_head_stride,
    v_stride,
    o_head_stride,
    o_stride,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # the last queries see most keys: they start first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, DIMS)
    inside = (t < T)[:, None] & (d < D)[None, :]
    q = tl.load(
        queries + head * q_head_stride + t.to(tl.int64)[:, None] * q_stride + d[None, :],
        mask=inside,
        other=0.0,
    )
    k_head = keys + (head // G) * k_head_stride
    v_head = values + (head // G) * v_head_stride
    LOG2E: tl.constexpr = 1.4426950408889634
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, DIMS), tl.float32)
    stop = N
    if CAUSAL:
        stop = tl.minimum(N, N - T + (block + 1) * BLOCK_T)
    for first in range(0, stop, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        at = i.to(tl.int64)[:, None]
        there = (i < N)[:, None] & (d < D)[None, :]
        k = tl.load(k_head + at * k_stride + d[None, :], mask=there, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        seen = (i < N)[None, :]
        if CAUSAL:
            seen = seen & (i[None, :] <= N - T + t[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        # a query beyond T in the last block may have seen nothing yet
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - safe)
        p = tl.exp2(logits - safe[:, None])
        v = tl.load(v_head + at * v_stride + d[None, :], mask=there, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        mass = mass * shrink + tl.sum(p, 1)
        top = higher
    some = mass > 0
    acc = acc / tl.where(some, mass, 1.0)[:, None]
    at = out + head * o_head_stride + t.to(tl.int64)[:, None] * o_stride + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)
    total = top / LOG2E + tl.log(tl.where(some, mass, 1.0))
    tl.store(lse + head * T + t, tl.where(some, total, float("-inf")), mask=t < T)


def attend_prompt(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
) -> None:
    """Attention of ``queries`` [Hq, T, D] over ``keys`` and ``values`` [Hkv, N, D] of their type.

    With ``causal`` query t sees keys 0 to N - T + t. ``out`` [Hq, T, D] is written in its type and
    ``lse`` [Hq, T] float32. Strides are free but for the last axis.
    """
    Hq, T, D = queries.shape
    Hkv, N, _ = keys.shape
    small = D > 128 or queries.dtype == torch.float32
    block_t, block_n = (64, 32) if small else (128, 64)
    _attend[(triton.cdiv(T, block_t), Hq)](
        queries,
        keys,
        values,
        out,
        lse,
        T,
        N,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        out.stride(0),
        out.stride(1),
        scale,
        G=Hq // Hkv,
        D=D,
        DIMS=power_of_two(D, 16),
        CAUSAL=causal,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        num_warps=4 if small else 8,
        num_stages=2 if small else 3,
    )


def attend_prompt_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
) -> None:
    """`attend_prompt` in plain tensor code, float32."""
    Hq, T, D = queries.shape
    Hkv, N, _ = keys.shape
    grouped = queries.float().reshape(Hkv, -1, T, D)
    logits = grouped @ keys.float().transpose(1, 2)[:, None] * scale
    if causal:
        hidden = torch.ones(T, N, dtype=torch.bool, device=queries.device).triu_(N - T + 1)
        logits = logits.masked_fill(hidden, -torch.inf)
    lse.copy_(logits.logsumexp(-1).view(Hq, T))
    out.copy_((logits.softmax(-1) @ values.float()[:, None]).view(Hq, T, D))
