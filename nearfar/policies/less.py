"""LESS: heavy hitters, and a learned summary of the dropped rows, of fixed size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from nearfar.policies.evicted_summary import FOLDED_ROWS, EvictedSummary
from nearfar.policies.feature_maps import (
    HIDDEN,
    RANK,
    LayerMaps,
    layer_maps,
    map_shapes,
    random_maps,
)
from nearfar.policies.h2o import H2O
from nearfar.policies.trained import check_trained, load_trained, trained_digest
from nearfar.records import Geometry, Partial


@dataclass(frozen=True)
class Less(H2O):
    """H2O with a low-rank state: dropped rows are added to it, and queries read it as more rows.

    ``maps`` is a file of training/train_less.py, or "random" for untrained maps; empty for those
    of smollm2-135m-128k.
    """

    maps: str = ""

    name = "less"
    traits = dataclasses.replace(
        H2O.traits,
        summary="heavy hitters, and a learned low-rank state of dropped rows",
        source="Dong et al., LESS, arXiv 2402.09398",
    )

    def contents(self) -> dict[str, str]:
        """The digest of the maps, in the place of their path."""
        return {"maps": trained_digest(self.name, self.maps)}

    def check_model(self, geometry: Geometry) -> None:
        """Refuse a model that the maps were not trained for."""
        check_trained(self.name, self.maps, geometry)

    def new_evicted_summary(self, geometry: Geometry, device: torch.device) -> EvictedSummary:
        """An empty state."""
        which = (self.name, self.maps, geometry, device)
        tensors = load_trained(*which, random_maps, map_shapes)
        layers = [layer_maps(tensors, layer) for layer in range(geometry.layers)]
        return LowRank(layers, geometry, device)

    def weighing_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Dropped rows and their features, folded a piece at a time."""
        row = 2 * geometry.head_dim * (dtype.itemsize + 4) + 4 * (2 * HIDDEN + 2 * RANK)
        return geometry.kv_heads * min(tokens, FOLDED_ROWS) * row

    def predict_evicted_summary_bytes(self, geometry: Geometry) -> int:
        """Sums of values and of features."""
        heads = geometry.layers * geometry.kv_heads
        return 4 * heads * RANK * (geometry.head_dim + 1)


class LowRank(EvictedSummary):
    """The sums over dropped rows that `LayerMaps.attend` reads, of every layer."""

    def __init__(self, maps: list[LayerMaps], geometry: Geometry, device: torch.device) -> None:
        self._maps = maps
        sizes = (geometry.layers, geometry.kv_heads, RANK)
        self._values = torch.zeros(*sizes, geometry.head_dim, device=device)
        self._masses = torch.zeros(*sizes, device=device)

    def fold(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add the rows' features and values."""
        for start in range(0, keys.shape[1], FOLDED_ROWS):
            some = slice(start, start + FOLDED_ROWS)
            sums = self._maps[layer].sums(keys[:, some].float(), values[:, some].float())
            self._values[layer] += sums[0]
            self._masses[layer] += sums[1]

    def attend(self, layer: int, queries: torch.Tensor) -> Partial:
        """The state's part."""
        return self._maps[layer].attend(queries, self._values[layer], self._masses[layer])

    def state(self) -> dict[str, torch.Tensor]:
        """Both sums."""
        return {"values": self._values, "masses": self._masses}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Copy into place, so that a mark can be restored twice and a graph finds its arrays."""
        self._values.copy_(state["values"])
        self._masses.copy_(state["masses"])
