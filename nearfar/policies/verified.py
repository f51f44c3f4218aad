"""Verified: a sample that grows until its estimated error is small, at every step.

The sample is that of `sketch`: heavy keys for certain, light ones drawn by estimated weight. From
the keys that were read the policy estimates the error of its output and of its mass
(`lsh.error_bound`). A KV group with a head above the bound draws again, more keys, up to all of
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.lsh.error_bound import sample_error
from nearfar.lsh.sampling import Weighing, draw_keys, weighing_bytes
from nearfar.lsh.sketch import LEVEL_WIDTH, LayerSketch, SketchMark, encoding_bytes, sketch_bytes
from nearfar.policies.base import Policy, Traits
from nearfar.policies.index import FarIndex
from nearfar.records import ALL, AllOrNone, FarView, Geometry, Selection, Verification
from nearfar.storage import decoding_bytes

SELECTING_BYTES = 2**19  # a first draw and its error, however few keys there are
ROUNDS = 6  # draws before everything is read
GROWTH = 2.0  # at least, from one draw to the next
MARGIN = 1.2  # more keys are drawn than the bound seems to need
Row = tuple[NDArray[np.int32], NDArray[np.float32]]  # keys and log-weights


@dataclass(frozen=True)
class Verified(Policy):
    """For each head, layer and step the error of the far part is below epsilon.

    With probability 1 - delta both are: the relative error of the output over far keys, and that of
    their mass. A draw is accepted if z times its estimated standard error is below epsilon, z the
    normal quantile of delta shared by two errors and ROUNDS draws.
    """

    epsilon: float = 0.05  # relative error of a head's far part
    delta: float = 0.05  # probability that it is larger
    bits: int = 4  # per dimension of a key, 1 to 4

    name = "verified"
    traits = Traits(
        kind="selects",
        summary="a sample that grows until its own estimate of its error is below epsilon",
        source="Poisson sampling with a verified bound, after vAttention (arXiv 2510.05688)",
        keeps_far=True,
    )

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            if not 0 < getattr(self, name) < 1:
                raise InvalidOptionError(
                    f"verified's {name} must be between 0 and 1. Got {getattr(self, name)!r}."
                )
        if self.bits not in LEVEL_WIDTH:
            raise InvalidOptionError(f"verified's bits must be 1, 2, 3 or 4. Got {self.bits!r}.")

    @property
    def quantile(self) -> float:
        """Standard errors within which an error is, with the share of delta that it has."""
        return NormalDist().inv_cdf(1 - self.delta / (2 * 2 * ROUNDS))

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> FarIndex:
        """Codes of every layer."""
        return VerifyingIndex(self, geometry, budget, seed)

    def predict_index_bytes(self, geometry: Geometry, num_keys: int) -> int:
        """As of `sketch`."""
        heads, dim = geometry.kv_heads, geometry.head_dim
        scratch = weighing_bytes(heads, geometry.group, heads, num_keys)
        return geometry.layers * sketch_bytes(heads, dim, self.bits, num_keys) + scratch

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Encoding as of `sketch`; then rows of a head that are read to know their error."""
        heads, dim = geometry.kv_heads, geometry.head_dim
        rows = tokens // 2 * (8 * dim + decoding_bytes(dtype, dim) + 16 * geometry.group)
        drawn = rows + heads * tokens * 24
        return max(encoding_bytes(heads, dim, tokens, dtype), drawn) + SELECTING_BYTES


class VerifyingIndex(FarIndex):
    """Codes of one sequence, and statistics of the bounds that held."""

    def __init__(self, policy: Verified, geometry: Geometry, budget: Budget, seed: int) -> None:
        self._policy, self._budget, self._seed = policy, budget, seed
        self._geometry = geometry
        Hkv, D = geometry.kv_heads, geometry.head_dim
        self._weighing = Weighing(Hkv, geometry.group, Hkv)
        self._layers = [LayerSketch(Hkv, D, policy.bits) for _ in range(geometry.layers)]
        self._account = Verification(0.0, 0, 0, 0, 0.0)

    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        """Encode the new keys."""
        self._layers[layer].extend(far)

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        """For every KV group the first draw whose estimated error is within the bound."""
        first = self._budget.keys(far.length)
        Hkv, G = self._geometry.kv_heads, self._geometry.group
        if first == far.length:
            self._count(0.0, 1.0, widened=False, exhausted=False)
            return ALL
        self._layers[layer].weigh(query, 1.0, self._weighing)
        rows = self._draw(layer, query.view(Hkv, G, -1), far, step, first)
        offsets = np.concatenate([[0], np.cumsum([len(indices) for indices, _ in rows])])
        indices, log_weights = (np.concatenate(each) for each in zip(*rows, strict=True))
        return Selection(indices, offsets, log_weights, G)

    def _draw(
        self, layer: int, queries: torch.Tensor, far: FarView, step: int, first: int
    ) -> list[Row]:
        """Keys and log-weights of each KV group: ``first`` keys, more if the error is large."""
        Hkv, N = len(queries), far.length
        rows: list[Row | None] = [None] * Hkv
        wanted = np.full(Hkv, first, np.int64)
        for attempt in range(ROUNDS):
            keys = draw_keys(self._seed, layer, step * ROUNDS + attempt, Hkv)
            drawn = self._weighing.draw(wanted, 1.0, keys)
            for head in [head for head in range(Hkv) if rows[head] is None]:
                span = slice(drawn.offsets[head], drawn.offsets[head + 1])
                row = drawn.indices[span], drawn.log_weights[span]
                bound, read = self._bound(queries[head], far, head, *row)
                if bound <= self._policy.epsilon:
                    rows[head] = row
                    self._count(bound, read, widened=attempt > 0, exhausted=False)
                    continue
                # a standard error falls with the root of how many keys are read
                growth = max(GROWTH, MARGIN * (bound / self._policy.epsilon) ** 2)
                if attempt + 1 == ROUNDS or growth * wanted[head] >= N:
                    rows[head] = np.arange(N, dtype=np.int32), np.zeros(N, np.float32)
                    self._count(0.0, 1.0, widened=True, exhausted=True)
                    continue
                wanted[head] = int(growth * wanted[head])
            if all(row is not None for row in rows):
                break
        return [row for row in rows if row is not None]

    def _bound(
        self,
        query: torch.Tensor,
        far: FarView,
        head: int,
        indices: NDArray[np.int32],
        log_weights: NDArray[np.float32],
    ) -> tuple[float, float]:
        """The largest bound of the heads of a group, and the least mass that they read."""
        if len(indices) == 0:
            return float("inf"), 0.0
        keys, values = far.gather(head, torch.from_numpy(indices))
        error = sample_error(query, keys, values, torch.from_numpy(log_weights))
        largest = float(torch.maximum(error.output, error.mass).max())
        return self._policy.quantile * largest, float(error.read_mass.min())

    def _count(self, bound: float, read: float, *, widened: bool, exhausted: bool) -> None:
        old = self._account
        self._account = Verification(
            max(old.bound, bound),
            old.selections + 1,
            old.widened + widened,
            old.exhausted + exhausted,
            max(old.missed_mass, 1 - read),
        )

    def pop_verification(self) -> Verification:
        """Statistics since the last call."""
        account, self._account = self._account, Verification(0.0, 0, 0, 0, 0.0)
        return account

    def mark(self) -> list[SketchMark]:
        """As of `sketch`."""
        return [layer.mark() for layer in self._layers]

    def rewind(self, mark: list[SketchMark]) -> None:
        """As of `sketch`."""
        for layer, saved in zip(self._layers, mark, strict=True):
            layer.rewind(saved)

    def index_bytes(self) -> int:
        """Codes, and the scratch of drawing."""
        Hkv, G = self._geometry.kv_heads, self._geometry.group
        longest = max(layer.length for layer in self._layers)
        scratch = weighing_bytes(Hkv, G, Hkv, longest)
        return sum(layer.num_bytes for layer in self._layers) + scratch
