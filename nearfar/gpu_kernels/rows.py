"""Addresses of the rows of several sequences, in a form that a kernel can read.

A batch is decoded together, but each sequence has its own rows, which are made and grow at
different times. A kernel in a CUDA graph must find the rows of the next step's sequences, so it
gets the address of a table and not the rows themselves.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def head_of(addresses, head_strides, b, h, TYPE: tl.constexpr):
    """Pointer to KV head ``h`` of the array of sequence ``b``, in a `RowTable`."""
    # without the hints nothing is known of a pointer that comes from memory, and loads are narrow
    address = tl.multiple_of(tl.load(addresses + b), 16)
    stride = tl.multiple_of(tl.load(head_strides + b), 16)
    pointer = tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)
    return tl.multiple_of(pointer + h * stride, 16)


@dataclass
class RowTable:
    """Arrays [Hkv, capacity, width] of B sequences, of one type; capacities may differ.

    ``addresses`` [B] int64 are those of the first elements, ``head_strides`` [B] int64 count
    elements from one KV head to the next; both are on the device and keep their place when `point`
    is called again. ``tensors`` are the arrays themselves, for references, which stay alive by
    them; there are none where `point` is told not to hold them. Each KV head of an array is
    contiguous, and starts on a multiple of 16 bytes.
    """

    addresses: Tensor
    head_strides: Tensor
    dtype: torch.dtype
    heads: int = 0  # Hkv
    width: int = 0  # elements of a key; 1 where arrays are [Hkv, capacity]
    tensors: list[Tensor] = field(default_factory=list)

    @property
    def count(self) -> int:
        """B."""
        return len(self.addresses)

    @classmethod
    def empty(cls, count: int, dtype: torch.dtype, device: torch.device) -> RowTable:
        """A table for ``count`` sequences that points nowhere yet."""
        numbers = torch.zeros(2, count, dtype=torch.int64, device=device)
        return cls(numbers[0], numbers[1], dtype)

    @classmethod
    def of(cls, rows: abc.Sequence[Tensor]) -> RowTable:
        """A table of ``rows``, at least one."""
        table = cls.empty(len(rows), rows[0].dtype, rows[0].device)
        table.point(rows)
        return table

    def point(self, rows: abc.Sequence[Tensor], *, hold: bool = True) -> None:
        """Point to ``rows``, one tensor a sequence."""
        for tensor in rows:
            assert tensor.dtype == self.dtype
            assert tensor[0].is_contiguous()
            assert tensor.stride(0) % 16 == 0
            assert tensor.data_ptr() % 16 == 0
        self.heads, self.width = rows[0].shape[0], rows[0].shape[2:].numel()
        self.tensors = list(rows) if hold else []
        places = [[t.data_ptr() for t in rows], [t.stride(0) for t in rows]]
        numbers = torch.tensor(places, dtype=torch.int64)
        if self.addresses.is_cuda:  # a copy from other memory waits for all that was launched
            numbers = numbers.pin_memory()
        self.addresses.copy_(numbers[0], non_blocking=True)
        self.head_strides.copy_(numbers[1], non_blocking=True)
