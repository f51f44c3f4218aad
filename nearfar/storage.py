"""How a far row is stored, in one place: types, bits, and encoding and decoding on any device.

A row holds one token's key and then its value, D items each, contiguous. Items are float32,
bfloat16, float16 (all finite: stores saturate) or int8.

int8. Key and value have a scale of their own, s, a bfloat16 that is the least with |x| <= 127 s
for every element x. An item v stands for v s. The scale needs no room: its 16 bits are the lowest
bits of the first 16 items, bit i in item i, so those 16 items are rounded to a multiple of s that
is even or odd, as the bit says. A row then takes exactly half of what bfloat16 takes; with scales
beside the items it would straddle one more cache line. The price is a rounding error twice as large
in 16 of the D items.
"""

from __future__ import annotations

import torch

from nearfar.errors import InvalidOptionError

SCALE_BITS = 16  # bits of a bfloat16, one in each of the first items
LARGEST = 127
_FLOAT16_MAX = 65504.0


def check_head_dim(dtype: torch.dtype, head_dim: int) -> None:
    """Refuse a storage type that heads of this size cannot have."""
    if dtype == torch.int8 and head_dim < SCALE_BITS:
        raise InvalidOptionError(
            f"Far memory of int8 needs heads of {SCALE_BITS} dimensions or more, and this model's "
            f"have {head_dim}. Use --far-dtype bfloat16."
        )


def encode(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [..., D] of any floating type as items of ``dtype``, on their device."""
    if dtype == torch.int8:
        return _to_int8(values)
    if dtype == torch.float16:
        values = values.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return values.to(dtype)


def decode(items: torch.Tensor) -> torch.Tensor:
    """What stored ``items`` [..., D] stand for: float32 for int8, else themselves, not copied."""
    if items.dtype != torch.int8:
        return items
    places = torch.arange(SCALE_BITS, device=items.device, dtype=torch.int32)
    bits = (items[..., :SCALE_BITS].int() & 1) << places
    scales = (bits.sum(-1, keepdim=True, dtype=torch.int32) << 16).view(torch.float32)
    return items * scales


def _to_int8(values: torch.Tensor) -> torch.Tensor:
    wide = values.float()
    exact = wide.abs().amax(-1, keepdim=True) / LARGEST
    # to bfloat16, up: no element may exceed 127 scales
    high = (exact.view(torch.int32) + 0xFFFF) >> 16
    scales = (high << 16).view(torch.float32)
    steps = wide / scales.where(scales > 0, 1.0)
    items = steps.round()
    places = torch.arange(SCALE_BITS, device=wide.device, dtype=torch.int32)
    bits = ((high >> places) & 1).float()
    # the nearest number with this lowest bit that is no larger than LARGEST
    marked = ((steps[..., :SCALE_BITS] - bits) / 2).round() * 2 + bits
    items[..., :SCALE_BITS] = marked.clamp(-(bits + LARGEST - 1), bits + LARGEST - 1)
    return items.to(torch.int8)
