"""A navigable graph over far keys, searched from neighbour to neighbour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.policies.base import Traits
from nearfar.policies.faiss_search import FaissSearch


@dataclass(frozen=True)
class FaissHnsw(FaissSearch):
    """HNSW: a graph links every key to its neighbours; a search follows the best keys seen so far.

    The graph holds keys in 8 bits a dimension.
    """

    neighbours: int = 16  # of a key on the layers above the lowest, where it has twice as many
    ef_construction: int = 40  # candidates while the graph is built
    ef_search: int = 64  # candidates while it is searched, at least as many as are wanted

    name = "faiss-hnsw"
    traits = Traits(
        kind="selects",
        summary="the best far keys found by a walk through a graph of neighbours",
        source="Malkov and Yashunin, HNSW, arXiv 1603.09320; faiss, arXiv 2401.08281",
        keeps_far=True,
    )

    def build(self, faiss: Any, keys: NDArray[np.float32]) -> Any:
        """Key by key."""
        bits = faiss.ScalarQuantizer.QT_8bit
        metric = faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexHNSWSQ(keys.shape[1], bits, self.neighbours, metric)
        index.hnsw.efConstruction = self.ef_construction
        index.train(keys)
        index.add(keys)
        return index

    def search(self, index: Any, queries: NDArray[np.float32], count: int) -> Any:
        """With enough candidates for what is wanted."""
        index.hnsw.efSearch = max(self.ef_search, count)
        return index.search(queries, count)

    def built_bytes(self, index: Any) -> int:
        """Codes, and the graph's neighbours, levels and offsets."""
        graph = index.hnsw
        links = 4 * graph.neighbors.size() + 4 * graph.levels.size() + 8 * graph.offsets.size()
        return int(links + index.ntotal * index.d)

    def predict_built_bytes(self, head_dim: int, num_keys: int) -> float:
        """A key is on one layer more with probability 1 / neighbours."""
        links = self.neighbours * (2 + 1 / max(1, self.neighbours - 1))
        return num_keys * (head_dim + 4 * links + 12)
