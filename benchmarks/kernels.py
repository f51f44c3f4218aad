"""Host kernels beside the copy of the same number of rows, which is what memory alone would take.

    python benchmarks/kernels.py

`torch.index_select` of as many rows (others, so that neither finds them in cache) is the ceiling:
it reads the rows and writes them once. Kernel and ceiling take turns; medians and the 20th and 80th
percentiles over rounds; the last line is JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nearfar.cpu_kernels.attend import attend_selected
from nearfar.lsh.sampling import draw_keys, sample_by_weight
from nearfar.lsh.sketch import LayerSketch
from nearfar.records import FarView, Selection

ROUNDS = 30
SHAPES = {
    "llama-3.1-8b": (32, 8, 128, 131_072, 2_621),
    "smollm2-135m": (9, 3, 64, 16_384, 1_024),
}
FLUSH = torch.empty(2**24)  # 64 MiB, more than the last-level cache


def rows_at_random(heads: int, num_keys: int, count: int, seed: int) -> np.ndarray[Any, Any]:
    """``count`` of ``num_keys`` rows for each head, ascending, [heads, count]."""
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.choice(num_keys, count, replace=False)) for _ in range(heads)])


def milliseconds(work: Callable[[], object]) -> float:
    """Of one call that finds nothing in cache."""
    FLUSH.add_(1)
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def in_turns(works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Median, 20th and 80th percentile of each, interleaved."""
    for work in works.values():
        work()
    rounds = [{name: milliseconds(work) for name, work in works.items()} for _ in range(ROUNDS)]
    return {
        name: [round(float(np.percentile([r[name] for r in rounds], p)), 3) for p in (50, 20, 80)]
        for name in works
    }


def attention_rows(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """`attend_selected` beside the copy of its rows."""
    Hq, Hkv, D, N, M = SHAPES[name]
    rows = torch.randn(Hkv, N, 2 * D).to(dtype)
    chosen = rows_at_random(Hkv, N, M, seed=1).astype(np.int32)
    offsets = np.arange(Hkv + 1, dtype=np.int64) * M
    weights = np.zeros(Hkv * M, np.float32)
    selection = Selection(chosen.ravel(), offsets, weights, Hq // Hkv)
    others = torch.from_numpy(rows_at_random(Hkv, N, M, seed=2))
    query, far = torch.randn(Hq, D) / D**0.5, FarView(rows, N)
    times = in_turns(
        {
            "copy": lambda: [rows[h].index_select(0, others[h]) for h in range(Hkv)],
            "ours": lambda: attend_selected(query, far, selection),
        }
    )
    ratio = round(times["ours"][0] / times["copy"][0], 2)
    return {"kernel": "attend_selected", "shape": name, "dtype": str(dtype), "ratio": ratio} | times


def selection_rows(name: str, bits: int) -> dict[str, Any]:
    """Scoring all far keys and drawing, beside reading as many bytes once."""
    Hq, Hkv, D, N, M = SHAPES[name]
    sketch = LayerSketch(Hkv, D, bits)
    sketch.extend(FarView(torch.randn(Hkv, N, 2 * D).bfloat16(), N))
    query, codes = torch.randn(Hq, D) / D**0.5, torch.empty(sketch.num_bytes // 4).zero_()
    keys = draw_keys(0, 0, 0, Hkv)
    times = in_turns(
        {
            "read": lambda: codes.sum(),
            "score": lambda: sketch.scores(query),
            "both": lambda: sample_by_weight(sketch.scores(query), N, M, 1.0, keys),
        }
    )
    ratio = round(times["both"][0] / times["read"][0], 2)
    return {"kernel": "sketch select", "shape": name, "bits": bits, "ratio": ratio} | times


def main() -> None:
    """Measure, print."""
    rows = []
    for name in SHAPES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            rows.append(attention_rows(name, dtype))
            print(rows[-1], flush=True)
        for bits in (4, 2, 1):
            rows.append(selection_rows(name, bits))
            print(rows[-1], flush=True)
    print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
