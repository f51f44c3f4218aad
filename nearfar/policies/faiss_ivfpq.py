"""Inverted lists of product-quantised far keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.policies.base import Traits
from nearfar.policies.faiss_search import FaissSearch

CODES = 256  # of a part of a key, one byte


@dataclass(frozen=True)
class FaissIvfPq(FaissSearch):
    """Keys in lists by their nearest centroid, each part of a few dimensions as one byte.

    A search looks at the lists whose centroids have the largest product with the query.
    """

    list_keys: int = 64  # of a list, in the mean
    part: int = 2  # dimensions that share a byte
    probed: float = 0.25  # share of the lists that a search looks at

    name = "faiss-ivfpq"
    traits = Traits(
        kind="selects",
        summary="the best far keys by product-quantised codes in inverted lists",
        source="Jegou et al., Product Quantization, TPAMI 2011; faiss, arXiv 2401.08281",
        keeps_far=True,
    )

    def build(self, faiss: Any, keys: NDArray[np.float32]) -> Any:
        """Centroids and codes from a sample of the keys, as faiss draws it."""
        n, D = keys.shape
        metric = faiss.METRIC_INNER_PRODUCT
        lists = self._lists(n)
        coarse = faiss.IndexFlat(D, metric)
        index = faiss.IndexIVFPQ(coarse, D, lists, self._parts(D), 8, metric)
        # a prompt waits for this training in every head; more of it finds no more keys
        for training, points, rounds in ((index.cp, 64, 5), (index.pq.cp, 16, 4)):
            training.min_points_per_centroid = 1  # else it warns of small prompts
            training.max_points_per_centroid = points
            training.niter = rounds
        index.train(keys)
        index.add(keys)
        index.nprobe = max(1, round(self.probed * lists))
        return index

    def search(self, index: Any, queries: NDArray[np.float32], count: int) -> Any:
        """In the nearest lists."""
        return index.search(queries, count)

    def built_bytes(self, index: Any) -> int:
        """Codes and numbers of keys, centroids of lists and of parts."""
        key = index.code_size + 8
        return int(index.ntotal * key + 4 * index.d * (index.nlist + CODES))

    def predict_built_bytes(self, head_dim: int, num_keys: int) -> float:
        """The same."""
        centroids = self._lists(num_keys) + CODES
        return num_keys * (self._parts(head_dim) + 8) + 4 * head_dim * centroids

    def _lists(self, num_keys: int) -> int:
        return max(1, num_keys // self.list_keys)

    def _parts(self, head_dim: int) -> int:
        """Bytes of a key: parts are of equal size."""
        parts = max(1, head_dim // self.part)
        while head_dim % parts:
            parts += 1
        return parts
