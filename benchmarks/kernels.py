"""The host kernels beside memory's own speed, and choosing keys beside faiss.

    python benchmarks/kernels.py                # about five minutes on two cores
    python benchmarks/kernels.py --threads 16

The first part is `nearfar bench host` for two shapes. The second scores and draws 1 % of the keys
of a layer by sketches, and lets faiss search as many of the same keys in indexes of as many bits,
in turns, with the same threads. Keys are centred for all: RaBitQ needs it. Recall is the share of
the true best 1 % among the 1 % with the best estimates. faiss is needed for the second part only:
pip install faiss-cpu. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from nearfar.evaluation.host_cases import Case, HostSetting, Work
from nearfar.evaluation.host_speed import HostResult, bench_host, measure, using_threads
from nearfar.evaluation.shapes import shape_config
from nearfar.lsh.sampling import Weighing, draw_keys
from nearfar.lsh.sketch import LayerSketch
from nearfar.records import FarView
from nearfar.runtime.hardware import default_threads

SHAPES = {"llama-3.1-8b": (131_072, 2_621), "smollm2-135m": (16_384, 1_024)}
SHARE = 100  # one key in so many is searched for


def show(result: HostResult, note: str = "") -> None:
    """One line."""

    def ms(timing: Any) -> str:
        low, high = timing.p20_seconds * 1e3, timing.p80_seconds * 1e3
        return f"{timing.median_seconds * 1e3:.3g} ({low:.3g} - {high:.3g}) ms"

    rivals = "".join(f", {name} {ms(timing)}" for name, timing in result.rivals.items())
    print(
        f"{result.kernel}, {result.storage}, {result.threads} threads: {result.ceiling_name} "
        f"{ms(result.ceiling)}, nearfar {ms(result.nearfar)}, ratio {result.ratio:.2f}"
        f"{rivals}{note}",
        flush=True,
    )


def kernels(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """`bench host` of one shape."""
    num_keys, budget = SHAPES[name]
    geometry = shape_config(name, num_keys).geometry
    print(f"== {name}, {num_keys} keys", flush=True)
    speed = bench_host(HostSetting(geometry, num_keys, budget, threads, rounds), show)
    print(speed.indexing, "huge pages:", speed.huge_page_share, flush=True)
    return {"shape": name} | dataclasses.asdict(speed)


def uneven_keys(Hkv: int, N: int, D: int) -> torch.Tensor:
    """Keys [Hkv, N, D] as models have them: around a common centre, wider in some directions."""
    generator = torch.Generator().manual_seed(3)
    widths = torch.logspace(0.5, -0.5, D)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    centre = 2 * torch.randn(Hkv, 1, D, generator=generator)
    keys: torch.Tensor = torch.randn(Hkv, N, D, generator=generator).mul_(widths) @ turn
    return keys.add_(centre)


def faiss_indexes(D: int, bits: int) -> dict[str, Callable[[], Any]]:
    """Indexes of inner products that keep ``bits`` a dimension."""
    import faiss

    product = faiss.METRIC_INNER_PRODUCT
    made: dict[str, Callable[[], Any]] = {
        "faiss PQ fast scan": lambda: faiss.IndexPQFastScan(D, D * bits // 4, 4, product),
        "faiss RaBitQ": lambda: faiss.IndexRaBitQ(D, product, bits),
    }
    if bits == 4:
        kind = faiss.ScalarQuantizer.QT_4bit
        made["faiss scalar quantiser"] = lambda: faiss.IndexScalarQuantizer(D, kind, product)
    return made


def recall(found: list[np.ndarray[Any, Any]], true: list[np.ndarray[Any, Any]]) -> float:
    """Share of ``true`` rows that is in ``found`` rows."""
    shares = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, true, strict=True)]
    return float(np.mean(shares))


class Search:
    """One layer's keys and queries, and the ways to find the best of them."""

    def __init__(self, name: str, bits: int, threads: int) -> None:
        geometry = shape_config(name, 1).geometry
        self.name, self.bits, self.threads, self.geometry = name, bits, threads, geometry
        self.N = SHAPES[name][0]
        self.k = self.N // SHARE
        keys = uneven_keys(geometry.kv_heads, self.N, geometry.head_dim)
        keys -= keys.mean(1, keepdim=True)
        generator = torch.Generator().manual_seed(4)
        shape = (geometry.query_heads, geometry.head_dim)
        self.query = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        grouped = self.query.view(geometry.kv_heads, -1, shape[1])
        best = (grouped @ keys.transpose(1, 2)).topk(self.k, -1).indices
        self.true = list(best.flatten(0, 1).numpy())
        self.keys, self.grouped = keys.numpy(), grouped.numpy()

    def sketch(self) -> tuple[Callable[[np.random.Generator], Work], float]:
        """Our scan and draw, and its recall."""
        Hkv, N, D = self.keys.shape
        rows = torch.zeros(Hkv, N, 2 * D)
        rows[..., :D] = torch.from_numpy(self.keys)
        layer = LayerSketch(Hkv, D, self.bits)
        layer.extend(FarView(rows, N))
        best = torch.from_numpy(layer.scores(self.query)).topk(self.k, -1).indices
        weighing = Weighing(Hkv, self.geometry.group, Hkv)

        def select(keys: np.ndarray[Any, Any]) -> None:
            layer.weigh(self.query, 1.0, weighing)
            weighing.draw(self.k, 1.0, keys)

        def draw(rng: np.random.Generator) -> Work:
            return partial(select, draw_keys(int(rng.integers(2**31)), 0, 0, Hkv))

        return draw, recall(list(best.flatten(0, 1).numpy()), self.true)

    def faiss(self, make: Callable[[], Any]) -> tuple[Work, float]:
        """A search of faiss, heads side by side where there are threads for it, and its recall."""
        import faiss

        Hkv = len(self.keys)
        side_by_side = min(self.threads, Hkv)
        faiss.omp_set_num_threads(max(1, self.threads // side_by_side))
        indexes = []
        for head in self.keys:
            index = make()
            index.train(head)
            index.add(head)
            indexes.append(index)
        pool = ThreadPoolExecutor(side_by_side)

        def search() -> list[np.ndarray[Any, Any]]:
            found = pool.map(lambda h: indexes[h].search(self.grouped[h], self.k)[1], range(Hkv))
            return [row for rows in found for row in rows]

        return search, recall(search(), self.true)


def against_faiss(name: str, bits: int, threads: int, rounds: int) -> dict[str, Any]:
    """Score and select beside the scans of faiss at equal bits."""
    search = Search(name, bits, threads)
    ours, our_recall = search.sketch()
    recalls = {"nearfar": our_recall}
    works: dict[str, Work] = {}
    for rival, make in faiss_indexes(search.geometry.head_dim, bits).items():
        works[rival], recalls[rival] = search.faiss(make)
    size = torch.ones(search.keys.size * bits // 32)

    def draw(rng: np.random.Generator) -> dict[str, Work]:
        both: dict[str, Work] = {"ceiling": size.sum, "nearfar": ours(rng)}
        return both | works

    case = Case("select 1 %", f"{bits} bits", 4 * size.numel(), "read", draw)
    result = measure(case, threads, rounds)
    show(result, f", recall { ({k: round(v, 3) for k, v in recalls.items()}) }")
    return {"shape": name, "recall": recalls} | dataclasses.asdict(result)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    given = parser.parse_args()
    with using_threads(given.threads):
        record: dict[str, Any] = {
            "threads": given.threads,
            "kernels": [kernels(name, given.threads, given.rounds) for name in given.shapes],
        }
        if importlib.util.find_spec("faiss") is None:
            print("faiss is not installed: nothing to compare selections with")
        else:
            record["faiss"] = [
                against_faiss(name, bits, given.threads, given.rounds)
                for name in given.shapes
                for bits in (4, 2, 1)
            ]
    print(json.dumps(record))


if __name__ == "__main__":
    main()
