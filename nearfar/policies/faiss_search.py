"""Nearest keys by an index of the library faiss: graphs and lists, to compare LSH with.

Each KV head of each layer has an index of its own over its far keys less their mean, for inner
products. An index is built over all keys of a prompt at once and then never changed; keys that come
later are compared one by one until there are enough of them for another. faiss is an optional part
(``pip install 'nearfar[rivals]'``) and imported when the first index is made.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.policies.base import Policy
from nearfar.policies.index import FarIndex
from nearfar.records import ALL, AllOrNone, FarView, Geometry, Selection
from nearfar.storage import decoding_bytes

DECODED_KEYS = 4096  # that are widened together
INDEX_KEYS = 1024  # fewer keys than this are compared one by one


@dataclass(frozen=True)
class FaissSearch(Policy):
    """Every query head finds its best budget / G keys; its KV group reads the union."""

    requires = ("faiss", "nearfar[rivals]")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise InvalidOptionError(
                    f"{self.name}'s {field.name} must be above 0. Got {value!r}."
                )

    @abstractmethod
    def build(self, faiss: Any, keys: NDArray[np.float32]) -> Any:
        """An index of ``keys`` [n, D] for inner products."""

    @abstractmethod
    def search(self, index: Any, queries: NDArray[np.float32], count: int) -> Any:
        """Scores and numbers [n, count] of the best keys; a number is -1 where none was found."""

    @abstractmethod
    def built_bytes(self, index: Any) -> int:
        """Bytes of an index."""

    @abstractmethod
    def predict_built_bytes(self, head_dim: int, num_keys: int) -> float:
        """The same before it is built."""

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> FarIndex:
        """Indexes of every layer and KV head."""
        return FaissIndex(self, geometry, budget)

    def predict_index_bytes(self, geometry: Geometry, num_keys: int) -> int:
        """One index of all keys, if there are enough, as after a prompt."""
        if num_keys < INDEX_KEYS:
            return 0
        head = self.predict_built_bytes(geometry.head_dim, num_keys) + 4 * geometry.head_dim
        return round(geometry.layers * geometry.kv_heads * head)

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Keys of a head in float32 and as many that faiss samples, in each thread that builds."""
        threads = min(geometry.kv_heads, torch.get_num_threads())
        decoding = DECODED_KEYS * (4 * geometry.head_dim + decoding_bytes(dtype, geometry.head_dim))
        return threads * (tokens * (8 * geometry.head_dim + 24) + decoding)


class _Segment(NamedTuple):
    """The keys of one layer from ``start`` to ``stop``."""

    start: int
    stop: int
    heads: list[Any]  # a faiss index of each KV head
    means: NDArray[np.float32]  # [Hkv, D]


class FaissIndex(FarIndex):
    """Segments of one sequence."""

    def __init__(self, policy: FaissSearch, geometry: Geometry, budget: Budget) -> None:
        import faiss

        self._faiss: Any = faiss
        self._policy, self._budget, self._geometry = policy, budget, geometry
        self._layers: list[tuple[_Segment, ...]] = [()] * geometry.layers

    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        """Index the keys that are in no segment yet, once there are enough."""
        segments = self._layers[layer]
        start = segments[-1].stop if segments else 0
        if far.length - start < INDEX_KEYS:
            return
        # a head is built by one thread, so that the same keys give the same graph
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            own = [FarView(rows[None], far.length) for rows in far.rows]
            built = list(pool.map(partial(self._build, start), own))
        heads, means = [index for index, _ in built], np.stack([mean for _, mean in built])
        self._layers[layer] = (*segments, _Segment(start, far.length, heads, means))

    def _build(self, start: int, far: FarView) -> tuple[Any, NDArray[np.float32]]:
        """The index of one head's keys from ``start`` on, and their mean [D]."""
        self._faiss.omp_set_num_threads(1)
        keys = np.empty((far.length - start, far.head_dim), np.float32)
        for first in range(start, far.length, DECODED_KEYS):
            stop = min(first + DECODED_KEYS, far.length)
            keys[first - start : stop - start] = far.keys(first, stop)[0].float().numpy()
        mean: NDArray[np.float32] = keys.mean(0)
        keys -= mean
        return self._policy.build(self._faiss, keys), mean

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        """The union of the keys that the heads of a group find; at most the budget."""
        budget = self._budget.keys(far.length)
        if budget == far.length:
            return ALL
        Hkv, G = self._geometry.kv_heads, self._geometry.group
        count = max(1, budget // G)
        self._faiss.omp_set_num_threads(1)  # of this thread: a few queries are soon answered
        segments = self._layers[layer]
        start = segments[-1].stop if segments else 0
        pending = far.keys(start, far.length).float().numpy()
        rows = []
        for head, queries in enumerate(query.view(Hkv, G, -1).numpy()):
            found = [self._search(segment, head, queries, count) for segment in segments]
            later = np.arange(start, far.length, dtype=np.int64)
            found.append((queries @ pending[head].T, np.tile(later, (G, 1))))
            scores, keys = (np.concatenate(each, 1) for each in zip(*found, strict=True))
            best = np.argsort(-scores, 1, kind="stable")[:, :count]
            # missing results have the score -inf: they are sorted last, and dropped
            chosen = np.unique(np.take_along_axis(keys, best, 1))
            rows.append(chosen[chosen >= 0].astype(np.int32))
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        indices = np.concatenate(rows)
        return Selection(indices, offsets, np.zeros(len(indices), np.float32), G)

    def _search(
        self, segment: _Segment, head: int, queries: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and far keys [G, n] of one segment."""
        wanted = min(count, segment.stop - segment.start)
        scores, numbers = self._policy.search(segment.heads[head], queries, wanted)
        there = numbers >= 0
        scores = np.where(there, scores + (queries @ segment.means[head])[:, None], -np.inf)
        return scores, np.where(there, numbers + segment.start, -1)

    def mark(self) -> list[tuple[_Segment, ...]]:
        """The segments as they are; they never change."""
        return list(self._layers)

    def rewind(self, mark: list[tuple[_Segment, ...]]) -> None:
        """Take back those of ``mark``."""
        self._layers = list(mark)

    def index_bytes(self) -> int:
        """Bytes of all indexes and means."""
        return sum(
            segment.means.nbytes + sum(self._policy.built_bytes(head) for head in segment.heads)
            for segments in self._layers
            for segment in segments
        )
