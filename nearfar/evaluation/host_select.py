"""Choosing keys by sketch as a case to measure, with the compressed indexes of faiss beside it.

Each scores all keys of a layer for all its query heads and chooses 1 % of them; keys are centred
for all, as RaBitQ needs it. Recall is the share of the true best 1 % that is among the 1 % with the
best estimates. The timed work is that of decoding: nearfar draws one set by weight for the heads of
a KV group, and faiss finds the best keys of each head. A search for the single best key shows the
time of faiss without keeping many.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.errors import InvalidOptionError
from nearfar.evaluation.host_cases import Case, HostSetting, Work, layer_query
from nearfar.lsh.sampling import Weighing, draw_keys
from nearfar.lsh.sketch import LayerSketch
from nearfar.records import FarView

SHARE = 100  # one key in a hundred is selected
Search = Callable[[int], list[NDArray[np.int64]]]  # the k best keys of each query head
FAISS_MIN_KEYS = 1000  # with fewer its training has too little to go by


def check_faiss(num_keys: int) -> None:
    """Raise InvalidOptionError if faiss cannot be measured."""
    if importlib.util.find_spec("faiss") is None:
        raise InvalidOptionError("faiss is not installed. Run: pip install 'nearfar[rivals]'")
    if num_keys < FAISS_MIN_KEYS:
        raise InvalidOptionError(f"faiss needs {FAISS_MIN_KEYS:,} keys or more. Got {num_keys:,}.")


class KeySearch:
    """One layer's keys and queries, the best keys of each head, and ways to find them."""

    def __init__(self, setting: HostSetting, far: FarView, *, against_faiss: bool) -> None:
        self.setting, self.far, self.against_faiss = setting, far, against_faiss
        self.k = max(1, far.length // SHARE)
        self.query = layer_query(setting)
        heads = self.query.view(setting.geometry.kv_heads, -1, setting.geometry.head_dim)
        self.grouped = heads.numpy()  # [Hkv, G, D]
        self.best = [
            row
            for keys, queries in zip(far.keys(), heads, strict=True)
            for row in (queries @ keys.float().T).topk(self.k, -1).indices.numpy()
        ]

    def case(self, bits: int) -> Case:
        """Scoring by codes of ``bits`` a dimension and drawing the keys."""
        geometry = self.setting.geometry
        sketch = LayerSketch(geometry.kv_heads, geometry.head_dim, bits)
        sketch.extend(self.far)
        weighing = Weighing(geometry.kv_heads, geometry.group, geometry.kv_heads)
        words = torch.ones(sketch.num_bytes // 4)
        estimated = torch.from_numpy(sketch.scores(self.query)).topk(self.k, -1).indices
        recalls = {"nearfar": self._recall(list(estimated.flatten(0, 1).numpy()))}
        rivals: dict[str, Work] = {}
        kinds = faiss_indexes(geometry.head_dim, bits) if self.against_faiss else {}
        for name, make in kinds.items():
            search = self._faiss(make)
            recalls[name] = self._recall(search(self.k))
            rivals |= {name: partial(search, self.k), f"{name}, best key only": partial(search, 1)}

        def select(keys: NDArray[np.uint32]) -> None:
            sketch.weigh(self.query, 1.0, weighing)
            weighing.draw(self.k, 1.0, keys)

        def draw(rng: np.random.Generator) -> dict[str, Work]:
            keys = draw_keys(int(rng.integers(2**31)), 0, 0, geometry.kv_heads)
            works: dict[str, Work] = {"ceiling": words.sum, "nearfar": partial(select, keys)}
            return works | rivals

        return Case("choose 1 % by sketch", f"{bits} bits", words.nbytes, "read", draw, recalls)

    def _faiss(self, make: Callable[[], Any]) -> Search:
        """A search of faiss, heads side by side where there are threads for it."""
        import faiss

        threads = self.setting.threads
        side_by_side = min(threads, len(self.grouped))
        indexes, keys = [], self.far.keys()
        for head in keys:
            centred = head.float()
            centred = centred.sub_(centred.mean(0)).numpy()
            index = make()
            index.train(centred)
            index.add(centred)
            indexes.append(index)
        # how many threads a search has is a setting of the thread that calls
        spread = partial(faiss.omp_set_num_threads, max(1, threads // side_by_side))
        pool = ThreadPoolExecutor(side_by_side, initializer=spread)

        def search(k: int) -> list[NDArray[np.int64]]:
            jobs = zip(indexes, self.grouped, strict=True)
            found = pool.map(lambda job: job[0].search(job[1], k)[1], jobs)
            return [row for rows in found for row in rows]

        return search

    def _recall(self, found: list[NDArray[np.int64]]) -> float:
        shares = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, self.best, strict=True)]
        return float(np.mean(shares))


def faiss_indexes(D: int, bits: int) -> dict[str, Callable[[], Any]]:
    """Indexes of inner products that keep ``bits`` a dimension."""
    import faiss

    product = faiss.METRIC_INNER_PRODUCT
    made: dict[str, Callable[[], Any]] = {
        "faiss PQ fast scan": lambda: faiss.IndexPQFastScan(D, D * bits // 4, 4, product),
        "faiss RaBitQ": lambda: faiss.IndexRaBitQ(D, product, bits),
        "faiss RaBitQ fast scan": lambda: faiss.IndexRaBitQFastScan(D, product, 32, bits),
    }
    if bits == 4:
        kind = faiss.ScalarQuantizer.QT_4bit
        made["faiss scalar quantiser"] = lambda: faiss.IndexScalarQuantizer(D, kind, product)
    return made
