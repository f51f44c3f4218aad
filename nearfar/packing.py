"""Keys and values of 2 and 4 bits: codes packed into bytes, with their steps and zeros.

A code c of b bits stands for c s + z. The step s and the zero z are bfloat16, chosen so that no
number is outside of 0 to 2^b - 1 steps above z: z is rounded down and s up. They are the halves of
one int32, s the upper one. 16 neighbouring dimensions are 2 b bytes; dimension i of them is in byte
i mod 2 b, b (i div 2 b) bits up, so that a vector of 16 is a load, a shuffle and a shift.

Per token (`int4`). Key and value have an s and a z each. A row is [s z | codes] of the key and then
of the value: D + 8 bytes.

In groups (`kivi-4`, `kivi-2`; Liu et al., KIVI, arXiv 2402.02750, with its group size 32). Keys
have outliers in a few channels: one step for all channels of a token is too coarse for the others.
So each channel has an s and a z for 32 tokens, and values have them for 32 channels of a token.
Tokens of a group are stored together: [s z of each channel of the keys | 32 rows], and a row is the
codes of the key, the s and z of the value, the codes of the value. That is b + 1 bits a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

GROUP = 32  # tokens or channels that have a step in common
PAIR_BYTES = 4  # of a step and a zero
BLOCK = 16  # dimensions whose codes are packed together


def quantise(numbers: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) of ``numbers``, and int32 pairs of step and zero along ``dim``, kept as 1."""
    wide, most = numbers.float(), 2**bits - 1
    low = wide.amin(dim, keepdim=True)
    # to bfloat16, towards -inf: bits of a negative number grow as it falls
    lower = (low.view(torch.int32) + 0xFFFF * (low < 0).int()) >> 16
    zeros = (lower << 16).view(torch.float32)
    exact = (wide.amax(dim, keepdim=True) - zeros) / most
    upper = (exact.view(torch.int32) + 0xFFFF) >> 16
    steps = (upper << 16).view(torch.float32)
    codes = ((wide - zeros) / steps.where(steps > 0, 1.0)).round().clamp(0, most)
    return codes.to(torch.uint8), (upper << 16) | (lower & 0xFFFF)


def restore(codes: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The float32 numbers of ``codes`` with ``pairs``, broadcast."""
    steps = (pairs & ~0xFFFF).view(torch.float32)
    return torch.addcmul((pairs << 16).view(torch.float32), codes.float(), steps)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., D b / 8] of ``codes`` [..., D]."""
    parts = _cut(codes, -1, (-1, 8 // bits, 2 * bits))
    packed = parts[..., 0, :].clone()
    for i in range(1, 8 // bits):
        packed |= parts[..., i, :] << (i * bits)
    return packed.flatten(-2)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`."""
    blocks = _cut(packed, -1, (-1, 2 * bits))
    parts = [(blocks >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(parts, -2).flatten(-3)


@dataclass(frozen=True)
class Packing:
    """One packed format; sizes are of one KV head. Numbers of a group are never split."""

    bits: int
    in_groups: bool

    @property
    def group_tokens(self) -> int:
        """Tokens that are stored together."""
        return GROUP if self.in_groups else 1

    def key_bytes(self, D: int) -> int:
        """Of the key's part of a row, which comes first."""
        return self.code_bytes(D) + (0 if self.in_groups else PAIR_BYTES)

    def row_bytes(self, D: int) -> int:
        """Of one token alone."""
        pairs = D // GROUP if self.in_groups else 1
        return self.key_bytes(D) + pairs * PAIR_BYTES + self.code_bytes(D)

    def group_bytes(self, D: int) -> int:
        """Of the shared part of a group, before its rows."""
        return D * PAIR_BYTES if self.in_groups else 0

    def token_bytes(self, D: int) -> int:
        """Of a token with its share of the group's part."""
        return self.row_bytes(D) + self.group_bytes(D) // self.group_tokens

    def code_bytes(self, D: int) -> int:
        """Of the codes of D numbers."""
        return D * self.bits // 8

    def head_dim(self, token_bytes: int) -> int:
        """The head dimension D of tokens of ``token_bytes`` bytes."""
        eights = 2 * self.bits + 2 if self.in_groups else 8  # bytes of a token by D, less the rest
        return token_bytes * 8 // eights if self.in_groups else token_bytes - 2 * PAIR_BYTES

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Bytes [..., n, token_bytes] of ``keys`` and ``values`` [..., n, D], n in whole groups."""
        bits, D = self.bits, keys.shape[-1]
        if not self.in_groups:
            halves = [quantise(x, bits, -1) for x in (keys, values)]
            parts = [(_as_bytes(pairs), pack(codes, bits)) for codes, pairs in halves]
            return torch.cat([*parts[0], *parts[1]], -1)
        groups = _cut(keys, -2, (-1, GROUP))
        key_codes, key_pairs = quantise(groups, bits, -2)
        codes, pairs = quantise(_cut(values, -1, (-1, GROUP)), bits, -1)
        own = [pack(key_codes.flatten(-3, -2), bits), _as_bytes(pairs.squeeze(-1))]
        rows = torch.cat([*own, pack(codes.flatten(-2), bits)], -1)
        together = _cut(rows, -2, (-1, GROUP)).flatten(-2)
        packed = torch.cat([_as_bytes(key_pairs.squeeze(-2)), together], -1)
        return _cut(packed, -1, (-1, self.token_bytes(D))).flatten(-3, -2)

    def keys(self, packed: torch.Tensor) -> torch.Tensor:
        """Keys [..., n, D] float32 of ``packed`` [..., n, token_bytes], whole groups."""
        common, rows = self._split(packed)
        if self.in_groups:
            return self._keys(common.unsqueeze(-2), rows).flatten(-3, -2)
        return self._keys(common, rows)

    def values(self, packed: torch.Tensor) -> torch.Tensor:
        """Values [..., n, D], as `keys` gives keys."""
        values = self._values(self._split(packed)[1])
        return values.flatten(-3, -2) if self.in_groups else values

    def gather(
        self, packed: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [M, D] of the tokens ``indices`` [M] of ``packed`` [n, token_bytes]."""
        common, rows = self._split(packed)
        if not self.in_groups:
            return self._keys(common, rows[indices]), self._values(rows[indices])
        group, place = indices // GROUP, indices % GROUP
        picked = rows[group, place]
        return self._keys(common[group], picked), self._values(picked)

    def _split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shared parts of groups [..., g, group_bytes]; rows [..., g, GROUP, row_bytes]."""
        if not self.in_groups:
            return packed[..., :0], packed
        # the last group may not be in the view whole: it was never filled
        whole = packed.shape[-2] // GROUP * GROUP
        groups = _cut(packed[..., :whole, :], -2, (-1, GROUP)).flatten(-2)
        D = self.head_dim(packed.shape[-1])
        common, rows = groups.tensor_split([self.group_bytes(D)], -1)
        return common, _cut(rows, -1, (-1, self.row_bytes(D)))

    def _keys(self, common: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        D = self._row_head_dim(rows)
        own = rows[..., : self.key_bytes(D)]
        if self.in_groups:
            return restore(unpack(own, self.bits), _as_pairs(common))
        return restore(unpack(own[..., PAIR_BYTES:], self.bits), _as_pairs(own[..., :PAIR_BYTES]))

    def _values(self, rows: torch.Tensor) -> torch.Tensor:
        D = self._row_head_dim(rows)
        pairs, codes = rows[..., self.key_bytes(D) :].tensor_split([-self.code_bytes(D)], -1)
        shape = (-1, GROUP if self.in_groups else D)
        numbers = _cut(unpack(codes, self.bits), -1, shape)
        return restore(numbers, _as_pairs(pairs).unsqueeze(-1)).flatten(-2)

    def _row_head_dim(self, rows: torch.Tensor) -> int:
        if not self.in_groups:
            return self.head_dim(rows.shape[-1])
        # codes of two numbers and an eighth of a pair a dimension
        return rows.shape[-1] * 8 // (2 * self.bits + 1)


def _cut(tensor: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """One dimension as several; the size of one of them, -1, follows."""
    whole = tensor.shape[dim] // -math.prod(sizes)
    shape = list(tensor.shape)
    shape[dim % tensor.ndim : dim % tensor.ndim + 1] = [whole if n < 0 else n for n in sizes]
    return tensor.reshape(shape)


def _as_bytes(pairs: torch.Tensor) -> torch.Tensor:
    return pairs.contiguous().view(torch.uint8)


def _as_pairs(packed: torch.Tensor) -> torch.Tensor:
    return packed.contiguous().view(torch.int32)
