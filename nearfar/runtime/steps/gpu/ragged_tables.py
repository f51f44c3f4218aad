"""Ragged rows for a kernel, which reads each KV head of each sequence as if it were a sequence."""

from __future__ import annotations

from collections import abc

import torch
from torch import Tensor

from nearfar.gpu_kernels.decode_attention import attend_rows
from nearfar.gpu_kernels.rows import RowTable
from nearfar.records import Geometry
from nearfar.runtime.memory.sequence import Sequence


class RaggedTables:
    """The rows that heads keep of the first prompt, in every layer of B sequences."""

    def __init__(self, geometry: Geometry, batch: int, dtype: torch.dtype, device: torch.device):
        self._batch, self._heads = batch, geometry.kv_heads
        rows = batch * geometry.kv_heads
        self._tables = [RowTable.empty(rows, dtype, device) for _ in range(geometry.layers)]
        self._lengths = torch.zeros(geometry.layers, rows, dtype=torch.int32, device=device)

    def bind(self, sequences: abc.Sequence[Sequence]) -> None:
        """Read the ragged rows of these sequences from now on."""
        lengths = torch.zeros(self._lengths.shape, dtype=torch.int32)
        for layer, table in enumerate(self._tables):
            heads = [head for sequence in sequences for head in self._heads_of(sequence, layer)]
            lengths[layer] = torch.tensor([len(head) for head in heads])
            # one head has no stride to the next
            alone = [head.as_strided((1, *head.shape), (0, *head.stride())) for head in heads]
            table.point(alone, hold=False)
        self._lengths.copy_(lengths)

    def attend(
        self, layer: int, query: Tensor, scale: float, splits: int, out: Tensor, lse: Tensor
    ) -> None:
        """Launch attention of ``query`` [B, Hq, D] into the last ``splits`` places of each head.

        ``out`` [B, Hq, S, D] and ``lse`` [B, Hq, S] are as for `attend_rows`.
        """
        rows, places = self._batch * self._heads, out.shape[2]
        attend_rows(
            query.view(rows, -1, query.shape[2]),
            self._tables[layer],
            self._lengths[layer],
            scale,
            splits,
            out.view(rows, -1, places, out.shape[3]),
            lse.view(rows, -1, places),
            places - splits,
        )

    def _heads_of(self, sequence: Sequence, layer: int) -> list[Tensor]:
        """Rows [M_h, 2 D] of each KV head; no rows if the prompt was kept whole."""
        ragged = sequence.layers[layer].ragged
        if ragged is not None:
            return ragged.heads
        return list(sequence.near[layer].rows[:, :0])
