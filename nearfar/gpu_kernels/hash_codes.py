"""Hash codes from the signs of projections, for the tables that the host keeps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearfar.gpu_kernels.types import power_of_two


@triton.jit
def _hash(
    keys,  # [H, n, D]
    centre,  # [H, D] float32
    planes,  # [tables * bits, D] float32
    codes,  # [H, tables, n] int16, written
    n,
    tables,
    key_head_stride,
    key_stride,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    table = tl.program_id(2)
    d = tl.arange(0, DIMS)
    c = tl.arange(0, COLUMNS)
    at = keys + h * key_head_stride + i.to(tl.int64)[:, None] * key_stride + d[None, :]
    k = tl.load(at, mask=(i < n)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    k -= tl.load(centre + h * D + d, mask=d < D, other=0.0)[None, :]
    plane = tl.load(
        planes + (table * BITS + c)[None, :] * D + d[:, None],
        mask=(c < BITS)[None, :] & (d < D)[:, None],
        other=0.0,
    )
    # a key so near a plane that ten bits of mantissa decide may lie on either side of it
    side = tl.dot(k, plane, input_precision="tf32") > 0
    code = tl.sum(side.to(tl.int32) << c[None, :], 1)
    tl.store(codes + (h * tables + table) * n + i, code.to(tl.int16), mask=i < n)


def hash_codes(keys: Tensor, centre: Tensor, planes: Tensor, bits: int, codes: Tensor) -> None:
    """Codes [H, tables, n] int16 (the bits of uint16) of ``keys`` [H, n, D] less ``centre`` [H, D].

    Bit b of table t is whether the key is above plane t * bits + b of ``planes`` [tables * bits, D]
    float32.
    """
    H, n, D = keys.shape
    block = 64
    _hash[(H, triton.cdiv(n, block), codes.shape[1])](
        keys,
        centre,
        planes,
        codes,
        n,
        codes.shape[1],
        keys.stride(0),
        keys.stride(1),
        D=D,
        DIMS=power_of_two(D, 16),
        BITS=bits,
        COLUMNS=16,
        BLOCK=block,
        num_warps=4,
    )


def hash_codes_reference(
    keys: Tensor, centre: Tensor, planes: Tensor, bits: int, codes: Tensor
) -> None:
    """`hash_codes` in plain tensor code, float32."""
    H, n, _ = keys.shape
    above = (keys.float() - centre[:, None]) @ planes.T > 0
    shifts = torch.arange(bits, dtype=torch.int32, device=keys.device)
    packed = (above.view(H, n, -1, bits).int() << shifts).sum(-1, dtype=torch.int32)
    codes.copy_(packed.transpose(1, 2).to(torch.int16))
