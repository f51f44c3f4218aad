"""The host kernels as cases to measure, each with its ceiling and rivals from torch.

A ceiling is the time of memory alone: copying as many other rows, or reading as many bytes in
order. Everything here is one layer of random keys and values, keys distributed as in real models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.cpu_kernels.attend import attend_all, attend_selected
from nearfar.evaluation.synthetic import PowerLawKeys
from nearfar.lsh.projections import random_projections
from nearfar.lsh.sketch import LayerSketch
from nearfar.lsh.tables import Workspace, empty_tables, extend_tables, find_candidates
from nearfar.records import FarView, Geometry, Selection
from nearfar.runtime.memory.host_memory import huge_page_bytes, reserve
from nearfar.storage import PACKINGS, encode_rows, group_tokens, row_width, token_bytes

SKETCH_BITS = (4, 2, 1)
TABLES, TABLE_BITS = 150, 10  # as published for MagicPIG
PIECE_KEYS = 8192  # that are made at a time
Work = Callable[[], object]


@dataclass(frozen=True)
class HostSetting:
    """One layer and the keys to read."""

    geometry: Geometry
    num_keys: int  # N
    budget: int  # keys that a KV group, or a head, reads
    threads: int
    rounds: int


@dataclass(frozen=True)
class Case:
    """A kernel to measure. ``draw`` makes the works of a round: ceiling, nearfar, then rivals."""

    kernel: str
    storage: str
    bytes_read: int
    ceiling_name: str  # copy: as many rows, elsewhere; read: as many bytes, in order
    draw: Callable[[np.random.Generator], dict[str, Work]]
    recall: Mapping[str, float] = field(default_factory=dict)  # by contender, where keys are chosen


def thread_counts(most: int) -> list[int]:
    """Powers of two below ``most``, and ``most``."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def random_far(setting: HostSetting, dtype: torch.dtype) -> FarView:
    """Random keys and values, in memory like that of far rows."""
    Hkv, D = setting.geometry.kv_heads, setting.geometry.head_dim
    group = group_tokens(dtype)
    N = -(-setting.num_keys // group) * group
    memory = torch.from_numpy(reserve(Hkv * N * token_bytes(dtype, D)))
    rows = memory.view(dtype).view(Hkv, N, row_width(dtype, D))
    keys = PowerLawKeys(Hkv, D, torch.float32, rows.device, 0)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, N, PIECE_KEYS):
        count = min(PIECE_KEYS, N - start)
        values = torch.randn(Hkv, count, D, generator=generator)
        rows[:, start : start + count] = encode_rows(keys.draw(count), values, dtype)
    return FarView(rows, setting.num_keys)


def huge_page_share(far: FarView) -> float | None:
    """Share of the rows on huge pages; None if the system does not report it."""
    memory = far.rows.view(torch.int8).numpy()
    granted = huge_page_bytes(memory)
    return None if granted is None else granted / memory.nbytes


def layer_query(setting: HostSetting) -> torch.Tensor:
    """Queries [Hq, D] of one token, scaled."""
    shape = (setting.geometry.query_heads, setting.geometry.head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return query.div_(float(shape[1]) ** 0.5)


def _picks(setting: HostSetting, rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """As many ascending keys of each row, [rows, budget]."""
    chosen = [rng.choice(setting.num_keys, setting.budget, replace=False) for _ in range(rows)]
    return np.sort(np.stack(chosen), axis=1)


def _attend(setting: HostSetting, far: FarView, storage: str, rows: int, name: str) -> Case:
    """Attention over random rows for ``rows`` sets of heads; rivals are added by the caller."""
    geometry, query = setting.geometry, layer_query(setting)
    count = rows * setting.budget
    flat = far.rows.view(-1, far.rows.shape[2])
    if flat.dtype in PACKINGS:
        flat = flat.view(torch.uint8)
    out = torch.empty(count, flat.shape[1], dtype=flat.dtype)
    starts = np.arange(rows) * geometry.kv_heads // rows * setting.num_keys
    offsets = np.arange(rows + 1, dtype=np.int64) * setting.budget
    weights = np.zeros(count, np.float32)

    def draw(rng: np.random.Generator) -> dict[str, Work]:
        others = torch.from_numpy((_picks(setting, rows, rng) + starts[:, None]).ravel())
        indices = _picks(setting, rows, rng).astype(np.int32).ravel()
        selection = Selection(indices, offsets, weights, geometry.query_heads // rows)
        return {
            "ceiling": partial(torch.index_select, flat, 0, others, out=out),
            "nearfar": partial(attend_selected, query, far, selection),
        }

    return Case(name, storage, out.nbytes, "copy", draw)


def attend_group(setting: HostSetting, far: FarView, storage: str) -> Case:
    """Selections that a KV group shares."""
    return _attend(setting, far, storage, setting.geometry.kv_heads, "attend, keys of a group")


def beside_all(setting: HostSetting, far: FarView, case: Case) -> Case:
    """``case``, and torch over all keys as its rival."""
    Hkv, _, width = far.rows.shape
    keys, values = (part[None] for part in (far.keys(), far.values()))
    query = layer_query(setting).view(1, Hkv, -1, width // 2).to(far.rows.dtype)
    dense = partial(torch.nn.functional.scaled_dot_product_attention, query, keys, values, scale=1)
    return _with_rivals(case, lambda _: {"torch SDPA over all keys": dense})


def beside(case: Case, other: Case) -> Case:
    """``case``, and another one's kernel as its rival: their ratio is of the same rounds."""

    def rivals(rng: np.random.Generator) -> dict[str, Work]:
        return {f"nearfar {other.storage}": other.draw(rng)["nearfar"]}

    return _with_rivals(case, rivals)


def _with_rivals(case: Case, rivals: Callable[[np.random.Generator], dict[str, Work]]) -> Case:
    return replace(case, draw=lambda rng: case.draw(rng) | rivals(rng))


def attend_heads(setting: HostSetting, far: FarView, storage: str) -> Case:
    """Selections of each head's own."""
    return _attend(setting, far, storage, setting.geometry.query_heads, "attend, keys of a head")


def attend_everything(setting: HostSetting, far: FarView, storage: str) -> Case:
    """All keys in order."""
    query, words = layer_query(setting), far.rows.view(-1).view(torch.float32)
    if storage != "float32":  # bit patterns may be no numbers
        words = torch.ones_like(words)

    def draw(_: np.random.Generator) -> dict[str, Work]:
        return {"ceiling": words.sum, "nearfar": partial(attend_all, query, far)}

    return Case("attend, all keys", storage, words.nbytes, "read", draw)


def probe_tables(setting: HostSetting, far: FarView) -> Case:
    """Finding the keys that collide in two tables, at the published size."""
    geometry = setting.geometry
    hashing = random_projections(geometry.head_dim, TABLE_BITS, TABLES, 0)
    empty = empty_tables(geometry.kv_heads, geometry.head_dim, TABLES)
    tables = extend_tables(empty, hashing, far)
    workspace = Workspace(geometry.query_heads, TABLES, 2)
    # as long as a bucket is on average
    width = max(1, min(setting.num_keys, 65_535) >> TABLE_BITS)
    count = geometry.query_heads * TABLES * len(tables.segments)
    buckets = torch.zeros(max(1, tables.nbytes // (2 * width)), width, dtype=torch.int16)
    out = torch.empty(count, width, dtype=torch.int16)

    def draw(rng: np.random.Generator) -> dict[str, Work]:
        seed = int(rng.integers(2**31))
        query = torch.randn(
            geometry.query_heads,
            geometry.head_dim,
            generator=torch.Generator().manual_seed(seed),
        )
        codes = hashing.codes(query)
        others = torch.from_numpy(rng.integers(0, len(buckets), count))
        return {
            "ceiling": partial(torch.index_select, buckets, 0, others, out=out),
            "nearfar": partial(find_candidates, tables, codes, workspace),
        }

    storage = f"{TABLES} x {TABLE_BITS} bits"
    return Case("probe tables", storage, out.nbytes, "copy", draw)


def index_seconds(setting: HostSetting, far: FarView) -> dict[str, float]:
    """Seconds of indexing the layer, and the indexes' bytes by those of its keys and values."""
    geometry = setting.geometry
    hashing = random_projections(geometry.head_dim, TABLE_BITS, TABLES, 0)
    for view in (FarView(far.rows, min(far.length, 2048)), far):  # the first compiles
        started = time.perf_counter()
        empty = empty_tables(geometry.kv_heads, geometry.head_dim, TABLES)
        tables = extend_tables(empty, hashing, view)
        halfway = time.perf_counter()
        sketch = LayerSketch(geometry.kv_heads, geometry.head_dim, max(SKETCH_BITS))
        sketch.extend(view)
        done = time.perf_counter()
    return {
        "tables_seconds": halfway - started,
        "tables_bytes_by_far_bytes": tables.nbytes / far.rows.nbytes,
        "sketch_seconds": done - halfway,
        "sketch_bytes_by_far_bytes": sketch.num_bytes / far.rows.nbytes,
    }
