"""The pinned exchange: memory that a decode step on the GPU shares with the host's threads.

Layout and meaning are those of `cpu_kernels.serve.Mailbox`; here are the tensors behind it, pinned
where there is a GPU, so that both processors have them at the same address.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np
import torch

from nearfar.cpu_kernels.attend_tile import head_block
from nearfar.cpu_kernels.items import row_array
from nearfar.cpu_kernels.mailbox import FLAG_WORDS, FarRowLayout, Mailbox
from nearfar.records import DrawnKeys, Geometry
from nearfar.runtime.memory.far_store import FarStore


@dataclass(frozen=True)
class ExchangeShape:
    """Sizes: L micro-batches of B sequences, R rows of heads that select together, F parts."""

    micro_batches: int
    batch: int
    rows: int  # R
    parts: int  # F
    segments: int  # 0: the GPU selects nothing
    segment_keys: int
    threads: int

    @staticmethod
    def parts_for(rows: int, threads: int) -> int:
        """Parts of a row, such that every thread has the same number of tasks."""
        return threads // int(np.gcd(rows, threads))


class PinnedExchange:
    """One mailbox: ``box`` for the threads of the host, tensors for the GPU."""

    def __init__(self, geometry: Geometry, shape: ExchangeShape, device: torch.device) -> None:
        self.shape, self.geometry, self.device = shape, geometry, device
        pinned = device.type == "cuda"
        L, B, R, F = shape.micro_batches, shape.batch, shape.rows, shape.parts
        Hq, D = geometry.query_heads, geometry.head_dim
        Gr = B * Hq // R

        def shared(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(sizes, dtype=dtype, pin_memory=pinned)

        words = FLAG_WORDS
        self.flags = shared(2, L, words, dtype=torch.int32)
        self.host_queries = shared(L, B, Hq, D)
        self.chosen = shared(L, R, shape.segments, shape.segment_keys, dtype=torch.int64)
        self.counts = shared(L, R, shape.segments, 2, dtype=torch.int32)
        # with two micro-batches the GPU computes one while the host reads for the other
        room = shape.segment_keys // 2 if L == 1 else 0
        fetched = (L, R, shape.segments, room)
        self.fetched = torch.zeros(fetched, dtype=torch.int64, device=device)
        self.fetched_counts = torch.zeros(fetched[:3], dtype=torch.int32, device=device)
        self.out = shared(L, R, F, Gr, D)
        self.lse = shared(L, R, F, Gr)
        self.box = Mailbox(
            self.flags[0].numpy(),
            self.flags[1].numpy(),
            self.host_queries.numpy(),
            self.chosen.numpy(),
            self.counts.numpy(),
            self.out.numpy(),
            self.lse.numpy(),
            np.zeros((L, B, geometry.layers), np.int64),
            np.zeros((L, B), np.int64),
            np.zeros((L, B), np.int64),
            np.zeros((L, words), np.int64),
            np.zeros((shape.threads, words), np.int64),
            np.zeros((L, geometry.layers, 2), np.int64),
            np.zeros(words, np.int64),
        )

    def drawn(
        self, micro_batch: int, readable_tokens: torch.Tensor, share: torch.Tensor
    ) -> DrawnKeys:
        """The buffers of a micro-batch's selection, and how GPU and host divide it."""
        fetched = (self.fetched[micro_batch], self.fetched_counts[micro_batch])
        return DrawnKeys(
            self.chosen[micro_batch], self.counts[micro_batch], *fetched, readable_tokens, share
        )

    def ready_address(self, micro_batch: int) -> int:
        """Address of the flag that the GPU writes."""
        return self.flags[0, micro_batch].data_ptr()

    def done_address(self, micro_batch: int) -> int:
        """Address of the flag that the GPU waits for."""
        return self.flags[1, micro_batch].data_ptr()

    def bind(self, micro_batch: int, stores: abc.Sequence[FarStore]) -> None:
        """Read the far rows of these sequences from now on, at their present lengths."""
        box = self.box
        for b, store in enumerate(stores):
            for layer in range(box.addresses.shape[2]):
                rows = store.view(layer).rows
                box.addresses[micro_batch, b, layer] = rows.data_ptr()
                box.head_strides[micro_batch, b] = rows.stride(0)
            box.lengths[micro_batch, b] = store.length(0)

    def reset(self) -> None:
        """Clear all requests and answers; only between two steps."""
        self.flags.zero_()
        self.box.arrivals[:] = 0


def row_layout_of(
    geometry: Geometry, store: FarStore, shape: ExchangeShape, *, everything: bool
) -> FarRowLayout:
    """How the host's threads read the rows of ``store``."""
    rows = row_array(store.view(0).rows[:, :1].contiguous())
    return FarRowLayout(
        head_block(shape.batch * geometry.query_heads // shape.rows),
        everything,
        geometry.kv_heads,
        np.empty((0, rows.shape[2]), rows.dtype),
        store.group_tokens,
        geometry.layers,
        shape.micro_batches,
        shape.threads,
    )
