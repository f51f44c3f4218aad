"""GPU kernels beside the minimum time of their bytes or operations, and beside the library.

    python benchmarks/gpu_kernels.py

Every line is one kernel at the shape of Llama-3.1-8B in bfloat16: microseconds (median of replayed
CUDA graphs over inputs that do not fit the cache), the ceiling (bytes at the measured bandwidth, or
operations at the measured rate of a large product), and the time of torch's own routine if there is
one. The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from nearfar.gpu_kernels import code_scores, coded_keys, key_weights, weighted_draw
from nearfar.gpu_kernels.decode_attention import attend_rows
from nearfar.gpu_kernels.fetch_attention import attend_fetched
from nearfar.gpu_kernels.hash_codes import hash_codes
from nearfar.gpu_kernels.matvec import matvec, silu_gate
from nearfar.gpu_kernels.merge import merge_splits
from nearfar.gpu_kernels.place_tokens import place_tokens
from nearfar.gpu_kernels.prefill_attention import attend_prompt
from nearfar.gpu_kernels.rotated_query_planes import plane_shape, quantise_queries
from nearfar.gpu_kernels.rows import RowTable
from nearfar.lsh.rotation import rotation
from nearfar.lsh.sketch import LEVEL_WIDTH
from nearfar.records import DrawnKeys

GPU = torch.device("cuda")
BF16 = torch.bfloat16
HQ, HKV, D, N = 32, 8, 128, 131_072
HIDDEN, INNER = 4096, 14336
ROUNDS = 15
SEGMENT_KEYS = 1024
CACHE_BYTES = 2**28  # the inputs used in turn are together larger than this
PCIE_BYTES_PER_US = 5e4

Rows = Iterator[dict[str, Any]]


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(*shape, dtype=dtype, device=GPU)


def microseconds(works: Sequence[Callable[[], object]] | Callable[[], object]) -> float:
    """Median time of one of ``works`` in a replayed graph that runs all of them."""
    works = [works] if callable(works) else works
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    samples = []
    for _ in range(ROUNDS + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / len(works))
    return float(np.median(samples[2:]))


def copies_of(num_bytes: int) -> int:
    """The number of inputs of this size that together do not fit the cache."""
    return max(2, min(64, CACHE_BYTES // num_bytes + 1))


def row(kernel: str, shape: str, ours: float, floor: float, library: float | None = None) -> Any:
    """One line of the result."""
    found = {"kernel": kernel, "shape": shape, "us": round(ours, 1), "ceiling_us": round(floor, 1)}
    found["times_the_ceiling"] = round(ours / floor, 2)
    if library is not None:
        found |= {"library_us": round(library, 1), "times_the_library": round(ours / library, 2)}
    return found


def products(bandwidth: float) -> Rows:
    """The four products of a layer and the output head, as a decode step uses them."""
    shapes: dict[str, tuple[int, int, dict[str, Any]]] = {
        "qkv": ((HQ + 2 * HKV) * D, HIDDEN, {"norm": randn(HIDDEN), "eps": 1e-5}),
        "output": (HIDDEN, HQ * D, {"add": True}),
        "gate_up": (INNER, HIDDEN, {"norm": randn(HIDDEN), "eps": 1e-5, "gated": True}),
        "down": (HIDDEN, INNER, {"add": True}),
        "head": (128_256, HIDDEN, {"norm": randn(HIDDEN), "eps": 1e-5}),
    }
    for name, (n, k, options) in shapes.items():
        rows = n * (1 + options.get("gated", False))
        weights = [randn(rows, k) for _ in range(copies_of(rows * k * 2))]
        x, out = randn(1, k), torch.zeros(1, n, dtype=BF16, device=GPU)
        ours = microseconds([partial(matvec, x, w, None, out, **options) for w in weights])
        library = microseconds([partial(F.linear, x, w) for w in weights])
        yield row("matvec", name, ours, rows * k * 2 / bandwidth, library)


def sketch(bandwidth: float, bits: int, budget: int = 1024) -> Rows:
    """Scoring, weighing and drawing over all keys of a layer."""
    segments, G = N // SEGMENT_KEYS, HQ // HKV
    lengths = torch.tensor([N], dtype=torch.int32, device=GPU)
    wanted, steps = torch.full_like(lengths, budget), torch.zeros_like(lengths)
    turn, keys = rotation(D).to(GPU).contiguous(), randn(HKV, N, D)
    W = coded_keys.bytes_per_key(D, bits)
    tables, encoding = [], []
    for _ in range(4):
        codes = torch.zeros(HKV, N, W, dtype=torch.uint8, device=GPU)
        factors = torch.zeros(HKV, N, dtype=torch.float16, device=GPU)
        tables.append((RowTable.of([codes]), RowTable.of([factors])))
        levels = (turn, bits, LEVEL_WIDTH[bits], 0)
        mean = keys.float().mean(1)
        encoding.append(partial(coded_keys.write_codes, keys, mean, *levels, codes, factors))
    num_bytes = HKV * N * (W + 2)
    floor = (num_bytes + keys.nbytes) / bandwidth
    yield row("write_codes", f"{bits} bits", microseconds(encoding), floor)
    planes = torch.zeros(1, HKV, *plane_shape(D, bits, G), dtype=torch.int8, device=GPU)
    sums, query = torch.zeros(1, HQ, 2, device=GPU), randn(1, HQ, D, dtype=torch.float32) * 0.3
    scores = torch.zeros(1, HKV, G, N, dtype=torch.float16, device=GPU)
    peaks = torch.zeros(1, HKV, G, segments, 2, device=GPU)
    weights = torch.zeros(HKV, N, device=GPU)
    budget_curve = torch.zeros(HKV, key_weights.CURVE_POINTS, dtype=torch.int64, device=GPU)
    chosen = torch.zeros(HKV, segments, 1024, dtype=torch.int64, pin_memory=True)
    counts = torch.zeros(HKV, segments, 2, dtype=torch.int32, pin_memory=True)
    fetched = torch.zeros(HKV, segments, SEGMENT_KEYS // 2, dtype=torch.int64, device=GPU)
    fetched_counts = torch.zeros(HKV, segments, dtype=torch.int32, device=GPU)
    keys_drawn = DrawnKeys(
        chosen, counts, fetched, fetched_counts, lengths, torch.full_like(lengths, 96)
    )
    turned = partial(quantise_queries, query, turn, bits, planes, sums)
    scored = [
        partial(
            code_scores.score_codes,
            planes,
            sums,
            *t,
            lengths,
            1.0,
            SEGMENT_KEYS,
            scores,
            peaks,
        )
        for t in tables
    ]
    sizes = (SEGMENT_KEYS, lengths, wanted, 1, 1.0)
    weighed = partial(key_weights.weigh_keys, scores[0], peaks[0], *sizes, weights, budget_curve)
    draws = (lengths, wanted, 1, steps, 0, 0)
    drawn = partial(weighted_draw.draw_keys, weights, budget_curve, *draws, keys_drawn)

    def select(score: Callable[[], None]) -> None:
        turned()
        score()
        budget_curve.zero_()
        weighed()
        drawn()

    yield row("quantise_queries", f"{bits} bits", microseconds([turned] * 8), D * D * 4 / bandwidth)
    yield row("score_codes", f"{bits} bits", microseconds(scored), num_bytes / bandwidth)
    yield row("weigh_keys", "32 heads", microseconds([weighed] * 4), scores.nbytes / bandwidth)
    whole = microseconds([partial(select, score) for score in scored])
    yield row("draw_keys", f"{budget}", microseconds([drawn] * 4), weights.nbytes / bandwidth)
    yield row("select, all", f"{bits} bits", whole, num_bytes / bandwidth)
    yield {"drawn": int(counts.sum()) / HKV, "bits": bits}
    yield from fetching(keys_drawn, lengths)


def fetching(drawn: DrawnKeys, lengths: Tensor) -> Rows:
    """Attention to the keys drawn for the GPU, in pinned host memory."""
    rows = torch.zeros(HKV, N, 2 * D, dtype=BF16, pin_memory=True)
    table = RowTable.empty(1, BF16, GPU)
    table.point([rows])
    out, lse = torch.zeros(1, HQ, 16, D, device=GPU), torch.zeros(1, HQ, 16, device=GPU)
    inputs = (randn(1, HQ, D), table, HKV, drawn, lengths, 0.09, 1, out, lse)
    fetched = microseconds([partial(attend_fetched, *inputs)] * 4)
    keys = int(drawn.fetched_counts.sum())
    link = keys * 4 * D / PCIE_BYTES_PER_US
    yield row("attend_fetched", f"{keys / HKV:.0f} keys", fetched, link)


def attention(bandwidth: float) -> Rows:
    """Decode attention over all keys and over near keys, merges, and storing of new rows."""
    for length, splits in ((132, 1), (N, 33)):
        caches = [randn(HKV, length, 2 * D) for _ in range(4)]
        lengths = torch.tensor([length], dtype=torch.int32, device=GPU)
        query = randn(1, HQ, D)
        out, lse = (torch.zeros(1, HQ, splits, *more, device=GPU) for more in ((D,), ()))
        ours = [
            partial(attend_rows, query, RowTable.of([cache]), lengths, 0.09, splits, out, lse)
            for cache in caches
        ]
        library = [
            partial(
                F.scaled_dot_product_attention,
                query.view(1, HQ, 1, D),
                cache[None, :, :, :D],
                cache[None, :, :, D:],
                enable_gqa=True,
            )
            for cache in caches
        ]
        times = (HKV * length * 4 * D / bandwidth, microseconds(library))
        yield row("attend_rows", f"{length} keys", microseconds(ours), *times)
        merge = partial(merge_splits, out, lse, None, None, randn(1, HQ, D))
        yield row(
            "merge_splits", f"{splits} splits", microseconds([merge] * 8), out.nbytes / bandwidth
        )
    far = torch.zeros(1, HKV, 2, HQ // HKV, D, pin_memory=True)
    far_lse = torch.zeros(1, HKV, 2, HQ // HKV, pin_memory=True)
    out, lse = torch.zeros(1, HQ, 1, D, device=GPU), torch.zeros(1, HQ, 1, device=GPU)
    merge = partial(merge_splits, out, lse, far, far_lse, randn(1, HQ, D))
    yield row(
        "merge_splits", "2 from the host", microseconds([merge] * 8), far.nbytes / PCIE_BYTES_PER_US
    )
    qkv, table = randn(1, (HQ + 2 * HKV) * D), RowTable.of([randn(HKV, 200, 2 * D)])
    angles, slot = (randn(1, D, dtype=torch.float32),) * 2, torch.tensor([5], device=GPU).int()
    host_queries = torch.zeros(1, HQ, D, pin_memory=True)
    inputs = (
        qkv,
        angles,
        None,
        0.0,
        table,
        slot,
        randn(1, HQ, D),
        0.1,
        host_queries.to(GPU),
        host_queries,
    )
    placed = microseconds([partial(place_tokens, *inputs)] * 8)
    yield row("place_tokens", "1 token", placed, host_queries.nbytes / PCIE_BYTES_PER_US)


def prompts(bandwidth: float, flops: float) -> Rows:
    """The kernels of prefill, for one layer."""
    T = 4096
    for keys in (T, N):
        queries, rows = randn(T, HQ, D).transpose(0, 1), randn(HKV, keys, 2 * D)
        out, lse = torch.empty_like(queries), torch.zeros(HQ, T, device=GPU)
        inputs = (queries, rows[..., :D], rows[..., D:], 0.09, out, lse)
        causal = microseconds(partial(attend_prompt, *inputs))
        work = 4 * HQ * D / flops
        yield row("attend_prompt", f"last {T} of {keys}", causal, work * (keys * T - T * T / 2))
        whole = microseconds(partial(attend_prompt, *inputs, causal=False))
        library = partial(
            torch.ops.aten._scaled_dot_product_cudnn_attention,
            *(x[None] for x in inputs[:3]),
            *(None, True, 0.0, False, False),
        )
        times = (work * keys * T, microseconds(library))
        yield row("attend_prompt", f"{T} over {keys}", whole, *times)
    gate_up = randn(T, 2 * INNER)
    gated = gate_up.new_empty(T, gate_up.shape[1] // 2)
    gating = microseconds(partial(silu_gate, gate_up, gated))
    yield row("silu_gate", f"{T} tokens", gating, gate_up.nbytes * 1.5 / bandwidth)
    qkv, table = randn(T, (HQ + 2 * HKV) * D), RowTable.of([randn(HKV, T, 2 * D)])
    angles, slots = (randn(T, D, dtype=torch.float32),) * 2, torch.arange(T, device=GPU).int()
    placed = partial(place_tokens, qkv, angles, None, 0.0, table, slots, randn(T, HQ, D), 0.1)
    placing = microseconds(placed)
    yield row("place_tokens", f"{T} tokens", placing, 2 * qkv.nbytes / bandwidth)
    planes, keys_ = randn(1500, D, dtype=torch.float32), randn(HKV, T, D)
    codes = torch.zeros(HKV, 150, T, dtype=torch.int16, device=GPU)
    hashing = partial(hash_codes, keys_, keys_.float().mean(1), planes, 10, codes)
    yield row(
        "hash_codes", f"{T} keys, 150 tables", microseconds(hashing), codes.nbytes / bandwidth
    )


def main() -> None:
    """Measure the ceilings, then every kernel; print."""
    data, other = (torch.ones(2**28, device=GPU) for _ in range(2))
    # by a kernel: the copy engine is slower
    bandwidth = 2 * data.nbytes / microseconds(partial(torch.mul, data, 2.0, out=other))
    left, right = randn(8192, 8192), randn(8192, 8192)
    flops = 2 * 8192**3 / microseconds(partial(torch.matmul, left, right))
    print(f"ceilings: {bandwidth / 1e6:.2f} TB/s, {flops / 1e6:.0f} TFLOP/s", flush=True)
    del data, other, left, right
    rows = []
    groups = [products(bandwidth), attention(bandwidth), prompts(bandwidth, flops)]
    for group in [*groups, *(sketch(bandwidth, bits) for bits in (4, 2, 1))]:
        for found in group:
            rows.append(found)
            print(found, flush=True)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    main()
