"""Importance sampling with hash tables: MagicPIG (Chen et al. 2024, arXiv 2410.16179).

A far key is read when its code equals the query's in at least ``min_collisions`` tables. It enters
the softmax with log-weight -log u, where u is the probability of that at its angle to the query, so
the sum over the keys that are read estimates the sum over all keys without bias. Keys are hashed
less their mean; logits and values are the keys' own. As in the paper each query head reads a set of
its own. Beyond the paper, tables take in tokens while an answer is generated and a budget caps what
is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.config import Budget
from nearfar.cpu_kernels.angles import interpolate_by_angle
from nearfar.cpu_kernels.buckets import keep_random
from nearfar.cpu_kernels.items import row_array
from nearfar.errors import InvalidOptionError
from nearfar.lsh.probability import log_weight_table
from nearfar.lsh.projections import CHUNK_VECTORS, random_projections
from nearfar.lsh.tables import (
    SEGMENT_TOKENS,
    SUM_TOKENS,
    LayerTables,
    Workspace,
    empty_tables,
    extend_tables,
    find_candidates,
    tables_bytes,
)
from nearfar.lsh.tables_state import LAYOUT, tables_arrays, tables_from_arrays
from nearfar.policies.base import Policy, Traits
from nearfar.policies.index import FarIndex, Form
from nearfar.records import ALL, NONE, AllOrNone, FarView, Geometry, Selection
from nearfar.storage import decoding_bytes

MAX_BITS = 16  # codes are stored in 16 bits
MAX_TABLES = 4096


@dataclass(frozen=True)
class LshTables(Policy):
    """Bits and tables decide the number of keys, which differs by head and query.

    The budget matters only if all far keys fit it: then all are read. With `capped` it also bounds
    the keys of a head, by dropping candidates at random. Bytes are then comparable, and the error
    is larger, because heavy and light keys are equally likely to be dropped.
    """

    name: ClassVar[str] = "lsh-tables"
    traits: ClassVar[Traits] = Traits(
        kind="selects",
        summary="samples far keys by LSH collisions and weighs them by their probability",
        source="MagicPIG, arXiv 2410.16179",
        keeps_far=True,
    )

    bits_per_table: int = 10
    num_tables: int = 150
    min_collisions: int = 2
    probability_floor: float = 1e-4  # added to u as in the published code; 0: no bias, more noise
    capped: bool = False  # whether the budget bounds what a head reads

    def __post_init__(self) -> None:
        for field, highest in (
            ("bits_per_table", MAX_BITS),
            ("num_tables", MAX_TABLES),
            ("min_collisions", self.num_tables),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or not 1 <= value <= highest:
                rule = f"a whole number from 1 to {highest}"
                raise InvalidOptionError(f"lsh-tables: {field} must be {rule}. Got {value!r}.")
        if not 0 <= self.probability_floor < 1:
            raise InvalidOptionError(
                "lsh-tables: probability_floor must be 0 or more and below 1. "
                f"Got {self.probability_floor!r}."
            )

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> LshTablesIndex:
        """Empty tables for one sequence."""
        return LshTablesIndex(self, geometry, budget, seed)

    def predict_index_bytes(self, geometry: Geometry, num_keys: int) -> int:
        """Tables and hyperplanes; scratch, a few MiB at any context, is left out."""
        bits, tables = self.bits_per_table, self.num_tables
        planes = bits * tables * geometry.head_dim * 4
        heads, dim = geometry.kv_heads, geometry.head_dim
        return planes + geometry.layers * tables_bytes(heads, dim, bits, tables, num_keys)

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """The codes that a segment is made of, scores of hyperplanes, keys; then candidates."""
        heads, dim = geometry.kv_heads, geometry.head_dim
        codes = min(tokens, SEGMENT_TOKENS) * heads * 2 * self.num_tables
        scores = 2 * 4 * CHUNK_VECTORS * self.bits_per_table * self.num_tables
        keys = min(tokens, SUM_TOKENS) * (heads * decoding_bytes(dtype, dim) + 8 * dim)
        keys += min(tokens, SUM_TOKENS) * heads * 8 * dim  # in float64, for their mean
        found = geometry.query_heads * (SEGMENT_TOKENS // 8 * self.min_collisions + 8 * tokens)
        return max(codes + scores + keys, found)


class LshTablesIndex(FarIndex):
    """The tables of every layer of one sequence."""

    def __init__(self, policy: LshTables, geometry: Geometry, budget: Budget, seed: int) -> None:
        bits, tables = policy.bits_per_table, policy.num_tables
        self._capped = policy.capped
        self._budget = budget
        self._seed = seed
        self._projections = random_projections(geometry.head_dim, bits, tables, seed)
        self._log_weights = log_weight_table(
            bits, tables, policy.min_collisions, policy.probability_floor
        )
        self._workspace = Workspace(geometry.query_heads, tables, policy.min_collisions)
        self._layers = [
            empty_tables(geometry.kv_heads, geometry.head_dim, tables)
            for _ in range(geometry.layers)
        ]

    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        """Hash the new far keys of ``layer``."""
        self._layers[layer] = extend_tables(self._layers[layer], self._projections, far)

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        """Candidates of each query head, or all keys if the budget allows."""
        budget = self._budget.keys(far.length)
        if far.length <= budget:
            return ALL if far.length else NONE
        limit = budget if self._capped else far.length
        tables, workspace = self._layers[layer], self._workspace
        codes = self._projections.codes(query)
        candidates = find_candidates(tables, codes, workspace)
        kept = np.minimum(candidates, limit)
        if (candidates > limit).any():
            draws = np.random.Generator(np.random.Philox([self._seed, layer, step]))
            uniforms = draws.random((len(candidates), limit))
            keep_random(workspace.found, candidates, limit, uniforms)
        offsets = np.concatenate([[0], np.cumsum(kept)])
        indices = np.concatenate(
            [row[:count] for row, count in zip(workspace.found, kept, strict=True)]
        )
        log_weights = np.empty(len(indices), np.float32)
        interpolate_by_angle(
            row_array(far.rows),
            tables.centre,
            _directions(query),
            indices,
            offsets,
            self._log_weights,
            log_weights,
        )
        thinned = np.log(np.maximum(candidates, 1) / np.maximum(kept, 1))
        log_weights += np.repeat(thinned, kept).astype(np.float32)
        return Selection(indices, offsets, log_weights, heads_per_row=1)

    def mark(self) -> tuple[LayerTables, ...]:
        """The tables as they are; they are never written to again."""
        return tuple(self._layers)

    def rewind(self, mark: tuple[LayerTables, ...]) -> None:
        """Take back the tables of ``mark``."""
        self._layers = list(mark)

    def form(self) -> Form:
        """Bits, tables and the seed of the hyperplanes."""
        bits = self._projections.bits_per_table
        tables = self._projections.num_tables
        return {
            "index": "lsh-tables",
            "bits_per_table": bits,
            "num_tables": tables,
            "seed": self._seed,
            "layout": LAYOUT,
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Those of every layer."""
        layers = enumerate(self._layers)
        return {
            f"{i}.{name}": array
            for i, layer in layers
            for name, array in tables_arrays(layer).items()
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]], num_keys: int) -> None:
        """Checks every id and start: the search follows them without checks."""
        buckets = 2**self._projections.bits_per_table
        for i, empty in enumerate(self._layers):
            self._layers[i] = tables_from_arrays(
                {n.removeprefix(f"{i}."): a for n, a in arrays.items() if n.startswith(f"{i}.")},
                empty,
                buckets,
                num_keys,
            )

    def index_bytes(self) -> int:
        """Tables, tails and centres of all layers, hyperplanes, scratch."""
        shared = self._projections.planes.nbytes + self._log_weights.nbytes
        return shared + self._workspace.nbytes + sum(layer.nbytes for layer in self._layers)


def _directions(query: torch.Tensor) -> NDArray[np.float32]:
    """``query`` [Hq, D] with each row at length 1, or 0 where it is 0."""
    wide = query.double()
    norms = wide.norm(dim=1, keepdim=True)
    directions: NDArray[np.float32] = (wide / norms.where(norms > 0, 1.0)).float().numpy()
    return directions
