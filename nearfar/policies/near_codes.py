"""The policy `sketch` on a GPU: index and selection by kernels."""

from __future__ import annotations

from typing import Any

import torch

from nearfar.lsh.near_sketch import NearLayerSketch, NearSketchSelection, SketchLaw
from nearfar.policies.index import NearIndex, NearSelector
from nearfar.records import DrawnKeys, FarView, Geometry


class NearCodes(NearIndex):
    """Codes of every layer of one sequence."""

    def __init__(self, bits: int, geometry: Geometry, device: torch.device) -> None:
        self.layers = [
            NearLayerSketch(geometry.kv_heads, geometry.head_dim, bits, device)
            for _ in range(geometry.layers)
        ]

    @property
    def layout(self) -> Any:
        """Addresses and capacity of the codes, which move when an array grows."""
        return tuple(
            (layer.codes.data_ptr(), layer.factors.data_ptr(), layer.capacity_tokens)
            for layer in self.layers
        )

    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        """Encode the new keys."""
        self.layers[layer].extend(far, arrived)

    def reserve(self, tokens: int) -> None:
        """Make room in every layer."""
        for layer in self.layers:
            layer.reserve(tokens)

    def mark(self) -> Any:
        """Lengths, means and arrays as they are."""
        return [layer.mark() for layer in self.layers]

    def rewind(self, mark: Any) -> None:
        """Take back those of ``mark``."""
        for layer, saved in zip(self.layers, mark, strict=True):
            layer.rewind(saved)

    def index_bytes(self) -> int:
        """Bytes of codes and factors."""
        return sum(layer.num_bytes for layer in self.layers)


class NearCodeSelector(NearSelector):
    """Scores, weighs and draws for a batch."""

    def __init__(
        self,
        law: SketchLaw,
        geometry: Geometry,
        batch: int,
        capacity_tokens: int,
        device: torch.device,
    ) -> None:
        self._kernels = NearSketchSelection(geometry, law, batch, capacity_tokens, device)
        self.rows_per_sequence = self._kernels.rows_per_sequence
        self.segment_keys = self._kernels.segment_keys

    def bind(self, indices: list[Any]) -> None:
        """Read the codes of these sequences from now on."""
        self._kernels.bind([index.layers for index in indices])

    def start_step(self) -> None:
        """Empty the budget curves of all layers."""
        self._kernels.start_step()

    def select(
        self,
        layer: int,
        queries: torch.Tensor,
        lengths: torch.Tensor,
        wanted: torch.Tensor,
        steps: torch.Tensor,
        drawn: DrawnKeys,
    ) -> None:
        """Launch the kernels of one layer."""
        self._kernels.select(layer, queries, lengths, wanted, steps, drawn)
