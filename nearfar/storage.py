"""How a far row is stored, in one place: types, bytes, and encoding and decoding on any device.

A row holds one token's key and then its value, D items each, contiguous. Items are float32,
bfloat16, float16 (all finite: stores saturate), int8, or packed (`nearfar.packing`). The type of
the tensor of rows decides how they are read; each packed format has an unsigned type of its own.

int8. Key and value have a scale of their own, s, a bfloat16 that is the least with |x| <= 127 s for
every element x. An item v means v s. The scale needs no room: its 16 bits are the lowest bits of
the first 16 items, bit i in item i, so those 16 items are rounded to an even or odd multiple of s,
according to the bit. A row then takes exactly half of what bfloat16 takes; with scales beside the
items it would straddle one more cache line. The price is a rounding error twice as large in 16 of
the D items.
"""

from __future__ import annotations

import torch

from nearfar.errors import InvalidOptionError
from nearfar.packing import BLOCK, GROUP, Packing

SCALE_BITS = 16  # bits of a bfloat16, one in each of the first items
LARGEST = 127
_FLOAT16_MAX = 65504.0
FORMATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "kivi-4": torch.uint32,
    "kivi-2": torch.uint64,
}
PACKINGS = {
    torch.uint8: Packing(4, in_groups=False),
    torch.uint32: Packing(4, in_groups=True),
    torch.uint64: Packing(2, in_groups=True),
}
_MULTIPLES = {torch.int8: 1, torch.uint8: BLOCK, torch.uint32: GROUP, torch.uint64: GROUP}


def format_name(dtype: torch.dtype) -> str:
    """The name of a storage type, as options and files have it."""
    return next(name for name, kind in FORMATS.items() if kind == dtype)


def fits(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether heads of this size can have a storage type."""
    multiple = _MULTIPLES.get(dtype)
    return multiple is None or (head_dim >= SCALE_BITS and head_dim % multiple == 0)


def check_head_dim(dtype: torch.dtype, head_dim: int) -> None:
    """Refuse a storage type that heads of this size cannot have."""
    if not fits(dtype, head_dim):
        multiple = _MULTIPLES[dtype]
        needed = f"a multiple of {multiple} dimensions"
        if multiple == 1:
            needed = f"{SCALE_BITS} dimensions or more"
        raise InvalidOptionError(
            f"Far memory of {format_name(dtype)} needs heads of {needed}, and this model's "
            f"have {head_dim}. Use --far-dtype bfloat16."
        )


def token_bytes(dtype: torch.dtype, head_dim: int) -> int:
    """Bytes of one far token of one KV head, with its share of the numbers of its group."""
    packing = PACKINGS.get(dtype)
    return 2 * head_dim * dtype.itemsize if packing is None else packing.token_bytes(head_dim)


def row_width(dtype: torch.dtype, head_dim: int) -> int:
    """Numbers of ``dtype`` in a row: 2 D, or the number that holds `token_bytes`."""
    return token_bytes(dtype, head_dim) // dtype.itemsize


def head_dim_of(dtype: torch.dtype, width: int) -> int:
    """The head dimension D of rows of ``width`` numbers."""
    packing = PACKINGS.get(dtype)
    return width // 2 if packing is None else packing.head_dim(width * dtype.itemsize)


def group_tokens(dtype: torch.dtype) -> int:
    """Tokens that can only be stored together: far memory of one head holds a multiple of it."""
    return PACKINGS[dtype].group_tokens if dtype in PACKINGS else 1


def bytes_read(dtype: torch.dtype, head_dim: int, rows: int, groups: int) -> int:
    """Bytes of ``rows`` rows, and of the shared parts of their ``groups`` groups."""
    packing = PACKINGS.get(dtype)
    if packing is None:
        return rows * token_bytes(dtype, head_dim)
    return rows * packing.row_bytes(head_dim) + groups * packing.group_bytes(head_dim)


def encode_rows(keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows [..., n, width] of ``keys`` and ``values`` [..., n, D], on their device."""
    packing = PACKINGS.get(dtype)
    if packing is None:
        return torch.cat([encode(keys, dtype), encode(values, dtype)], -1)
    return packing.encode(keys, values).view(dtype)


def encoding_bytes(dtype: torch.dtype, head_dim: int) -> int:
    """Most bytes a row that `encode_rows` works in, its result and what it widens included."""
    if dtype == torch.int8:
        return 13 * head_dim + 340
    return 14 * head_dim + 32 if dtype in PACKINGS else 4 * dtype.itemsize * head_dim


def decoding_bytes(dtype: torch.dtype, head_dim: int) -> int:
    """Peak bytes of `decode_keys` for each key, with its result; 0 if the result is a view."""
    coded = dtype in PACKINGS or dtype == torch.int8
    return 10 * head_dim + 80 if coded else 0


def decode_keys(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Keys [..., stop - start, D] of ``rows`` [..., n, width]: float32, or the stored ones."""
    packing = PACKINGS.get(rows.dtype)
    if packing is None:
        return decode(rows[..., start:stop, : rows.shape[-1] // 2])
    first, span = _whole_groups(packing, start, stop)
    return packing.keys(rows[..., span, :].view(torch.uint8))[..., first : first + stop - start, :]


def decode_values(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Values [..., stop - start, D], as `decode_keys` gives keys."""
    packing = PACKINGS.get(rows.dtype)
    if packing is None:
        return decode(rows[..., start:stop, rows.shape[-1] // 2 :])
    first, span = _whole_groups(packing, start, stop)
    return packing.values(rows[..., span, :].view(torch.uint8))[
        ..., first : first + stop - start, :
    ]


def gather(rows: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [M, D] of the tokens ``indices`` [M] of one head's ``rows`` [n, width]."""
    packing = PACKINGS.get(rows.dtype)
    if packing is not None:
        return packing.gather(rows.view(torch.uint8), indices)
    picked, D = rows[indices], rows.shape[-1] // 2
    return decode(picked[:, :D]), decode(picked[:, D:])


def encode(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [..., D] of any floating type as items of ``dtype``, on their device."""
    if dtype == torch.int8:
        return _to_int8(values)
    if dtype == torch.float16:
        values = values.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return values.to(dtype)


def decode(items: torch.Tensor) -> torch.Tensor:
    """The values of stored ``items`` [..., D]: float32 for int8, else themselves, not copied."""
    if items.dtype != torch.int8:
        return items
    places = torch.arange(SCALE_BITS, device=items.device, dtype=torch.int32)
    bits = (items[..., :SCALE_BITS].int() & 1) << places
    scales = (bits.sum(-1, keepdim=True, dtype=torch.int32) << 16).view(torch.float32)
    return items * scales


def _whole_groups(packing: Packing, start: int, stop: int) -> tuple[int, slice]:
    """The groups of ``start`` to ``stop``, and the offset of ``start`` in the first."""
    size = packing.group_tokens
    first = start // size * size
    return start - first, slice(first, -(-stop // size) * size)


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
