"""Rows of a table by index, the table in GPU memory or in pinned host memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.types import power_of_two


@triton.jit
def _embed(
    table,  # [V, H]
    indices,  # [B] int32
    out,  # [B, H], written
    H,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(indices + b).to(tl.int64)
    tl.store(out + b * H + i, tl.load(table + row * H + i, mask=i < H), mask=i < H)


def embed(table: Tensor, indices: Tensor, out: Tensor) -> None:
    """``out`` [B, H] = rows ``indices`` [B] int32 of ``table`` [V, H]."""
    B, H = out.shape
    block = min(1024, power_of_two(H))
    _embed[(B, triton.cdiv(H, block))](table, indices, out, H, BLOCK=block, num_warps=4)


def embed_reference(table: Tensor, indices: Tensor, out: Tensor) -> None:
    """`embed` in plain tensor code."""
    out.copy_(table[indices.to(table.device).long()])
