"""One result from partial results over disjoint sets of keys: near splits and far splits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.types import power_of_two


@triton.jit
def _merge(
    near_out,  # [B, Hq, S, D] float32
    near_lse,  # [B, Hq, S] float32
    far_out,  # [B, Hq / Gr, F, Gr, D] float32
    far_lse,  # [B, Hq / Gr, F, Gr] float32
    out,  # [B, Hq, D], written
    D: tl.constexpr,
    S: tl.constexpr,
    F: tl.constexpr,
    Gr: tl.constexpr,
    DIMS: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
):
    head = tl.program_id(0)
    d = tl.arange(0, DIMS)
    s = tl.arange(0, NEAR)
    near = head * S + s
    lse = tl.load(near_lse + near, mask=s < S, other=float("-inf"))
    inside = (s < S)[:, None] & (d < D)[None, :]
    parts = tl.load(near_out + near[:, None] * D + d[None, :], mask=inside, other=0.0)
    if FAR > 0:
        # all loads before the first use: those from the host take microseconds
        f = tl.arange(0, FAR)
        far = (head // Gr * F + f) * Gr + head % Gr
        inside_far = (f < F)[:, None] & (d < D)[None, :]
        lse_far = tl.load(far_lse + far, mask=f < F, other=float("-inf"))
        parts_far = tl.load(far_out + far[:, None] * D + d[None, :], mask=inside_far, other=0.0)
        top = tl.maximum(tl.max(lse, 0), tl.max(lse_far, 0))
    else:
        top = tl.max(lse, 0)
    # nothing at all: any finite reference gives every part the weight 0
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(lse - top)
    mass = tl.sum(weight, 0)
    mixed = tl.sum(parts * weight[:, None], 0)
    if FAR > 0:
        weight_far = tl.exp(lse_far - top)
        mass += tl.sum(weight_far, 0)
        mixed += tl.sum(parts_far * weight_far[:, None], 0)
    mixed = tl.where(mass > 0, mixed / tl.where(mass > 0, mass, 1.0), 0.0)
    tl.store(out + head * D + d, mixed.to(out.dtype.element_ty), mask=d < D)


def merge_splits(
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor | None,
    far_lse: Tensor | None,
    out: Tensor,
) -> None:
    """Write to ``out`` [B, Hq, D] the attention over all keys of all splits, exactly.

    ``near_out`` [B, Hq, S, D] and ``near_lse`` [B, Hq, S] float32 are those of `attend_rows`.
    ``far_out`` [B, Hq / Gr, F, Gr, D] and ``far_lse`` [B, Hq / Gr, F, Gr] float32, where there are
    any, come from the host, in rows of Gr query heads; they may lie in pinned host memory.
    """
    B, Hq, S, D = near_out.shape
    F, Gr = (0, 1) if far_lse is None else far_lse.shape[2:]
    _merge[(B * Hq,)](
        near_out,
        near_lse,
        near_out if far_out is None else far_out,
        near_lse if far_lse is None else far_lse,
        out,
        D=D,
        S=S,
        F=F,
        Gr=Gr,
        DIMS=power_of_two(D),
        NEAR=power_of_two(S),
        FAR=power_of_two(F) if F else 0,
        num_warps=4,
    )


def merge_splits_reference(
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor | None,
    far_lse: Tensor | None,
    out: Tensor,
) -> None:
    """`merge_splits` in plain tensor code, float64."""
    B, Hq, _, D = near_out.shape
    parts, lse = near_out.double(), near_lse.double()
    if far_out is not None and far_lse is not None:
        F = far_lse.shape[2]
        far = far_out.to(near_out.device).double().transpose(2, 3).reshape(B, Hq, F, D)
        far_total = far_lse.to(near_out.device).double().transpose(2, 3).reshape(B, Hq, F)
        parts, lse = torch.cat([parts, far], 2), torch.cat([lse, far_total], 2)
    top = lse.amax(2, keepdim=True)
    weights = torch.exp(lse - top.where(top.isfinite(), 0.0))
    mass = weights.sum(2)[..., None]
    mixed = (parts * weights[..., None]).sum(2) / mass.where(mass > 0, 1.0)
    out.copy_(mixed)


@triton.jit
def _merge_pair(
    out,  # [H, T, D], written
    lse,  # [H, T] float32, written
    other,  # [H, T, D]
    other_lse,  # [H, T] float32
    T,
    out_head_stride,
    out_stride,
    other_head_stride,
    other_stride,
    lse_stride,
    other_lse_stride,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIMS)
    inside = (t < T)[:, None] & (d < D)[None, :]
    at = t.to(tl.int64)[:, None]
    place = out + h * out_head_stride + at * out_stride + d[None, :]
    there = other + h * other_head_stride + at * other_stride + d[None, :]
    mine = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(lse + h * lse_stride + t, mask=t < T, other=float("-inf"))
    second = tl.load(other_lse + h * other_lse_stride + t, mask=t < T, other=float("-inf"))
    top = tl.maximum(first, second)
    top = tl.where(top == float("-inf"), 0.0, top)
    first, second = tl.exp(first - top), tl.exp(second - top)
    mass = first + second
    total = tl.where(mass > 0, top + tl.log(mass), float("-inf"))
    tl.store(lse + h * lse_stride + t, total, mask=t < T)
    mass = tl.where(mass > 0, mass, 1.0)
    mixed = mine * (first / mass)[:, None] + theirs * (second / mass)[:, None]
    tl.store(place, mixed.to(out.dtype.element_ty), mask=inside)


def merge_pair(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge the attention ``other`` over other keys into ``out``, exactly; both [H, T, D].

    ``lse`` and ``other_lse`` [H, T] float32 are their log-sum-exps, and ``lse`` becomes that of
    both; strides are free but for the last axis.
    """
    H, T, D = out.shape
    _merge_pair[(triton.cdiv(T, 32), H)](
        out,
        lse,
        other,
        other_lse,
        T,
        out.stride(0),
        out.stride(1),
        other.stride(0),
        other.stride(1),
        lse.stride(0),
        other_lse.stride(0),
        D=D,
        DIMS=power_of_two(D),
        BLOCK=32,
        num_warps=4,
    )


def merge_pair_reference(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """`merge_pair` in plain tensor code, float64."""
    weights = torch.stack([lse, other_lse]).double()
    top = weights.amax(0)
    weights = torch.exp(weights - top.where(top.isfinite(), 0.0))
    mass = weights.sum(0)
    first, second = (weights / mass.where(mass > 0, 1.0))[..., None]
    out.copy_(out.double() * first + other.double() * second)
    lse.copy_(torch.logaddexp(lse.double(), other_lse.double()))
