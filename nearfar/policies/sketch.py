"""Sketch: codes of a few bits for every far key, and a sample drawn by estimated weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.lsh.sampling import Weighing, draw_keys, weighing_bytes
from nearfar.lsh.sketch import (
    LAYOUT,
    LEVEL_WIDTH,
    STATE,
    LayerSketch,
    encoding_bytes,
    sketch_bytes,
)
from nearfar.policies.base import Policy, Traits, check_per
from nearfar.policies.index import FarIndex, Form, NearIndex, NearSelector
from nearfar.records import ALL, AllOrNone, FarView, Geometry, Selection

SELECTING_BYTES = 2**18  # what is drawn, beside the scratch that the index counts


@dataclass(frozen=True)
class Sketch(Policy):
    """Scores all far keys by their codes and reads about `budget` of them, drawn by weight.

    Heavy keys are read for certain; a light key that is read also stands for others like it, with
    log-weight -log(probability). The error depends on the number of keys, not on their share.
    """

    bits: int = 4  # per dimension of a key, 1 to 4; 1 is sign hashing
    per: str = "group"  # group: one set for a KV group; head: budget / G keys for each query head
    temper: float = 0.0  # exponent of the weight in the sampling law; 0: by bits

    name = "sketch"
    traits = Traits(
        kind="selects",
        summary="codes of 1-4 bits a dimension, far keys sampled by estimated weight",
        source="RaBitQ codes (arXiv 2405.12497), Poisson sampling proportional to size",
        keeps_far=True,
    )

    def __post_init__(self) -> None:
        if self.bits not in LEVEL_WIDTH:
            raise InvalidOptionError(f"sketch's bits must be 1, 2, 3 or 4. Got {self.bits!r}.")
        if not 0 <= self.temper <= 2:
            raise InvalidOptionError(
                f"sketch's temper must be between 0 (by bits) and 2. Got {self.temper!r}."
            )
        check_per(self.name, self.per)

    @property
    def exponent(self) -> float:
        """Noisy estimates need a flatter law: a heavy key that they miss would weigh too much."""
        return self.temper or (0.7 if self.bits <= 2 else 1.0)

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> FarIndex:
        """Codes of every layer."""
        return _Codes(self, geometry, budget, seed)

    def new_near_index(
        self, geometry: Geometry, budget: Budget, seed: int, device: torch.device
    ) -> NearIndex:
        """Codes of every layer, in the memory of a GPU."""
        from nearfar.policies.near_codes import NearCodes  # needs Triton, which a CPU does not

        return NearCodes(self.bits, geometry, device)

    def new_near_selector(
        self,
        geometry: Geometry,
        seed: int,
        batch: int,
        capacity_tokens: int,
        device: torch.device,
    ) -> NearSelector:
        """The kernels that score, weigh and draw."""
        from nearfar.lsh.near_sketch import SketchLaw
        from nearfar.policies.near_codes import NearCodeSelector

        law = SketchLaw(self.bits, self.exponent, self.per == "head", seed)
        return NearCodeSelector(law, geometry, batch, capacity_tokens, device)

    def predict_near_index_bytes(self, geometry: Geometry, num_keys: int) -> int:
        """Codes and one factor a key."""
        from nearfar.lsh.near_sketch import near_sketch_bytes

        layer = near_sketch_bytes(geometry.kv_heads, geometry.head_dim, self.bits, num_keys)
        return geometry.layers * layer

    def predict_index_bytes(self, geometry: Geometry, num_keys: int) -> int:
        """Codes and one factor a key, and the scratch of drawing, which all layers share."""
        layer = sketch_bytes(geometry.kv_heads, geometry.head_dim, self.bits, num_keys)
        return geometry.layers * layer + self._scratch_bytes(geometry, num_keys)

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """As of `lsh.sketch.LayerSketch.extend`."""
        sizes = (geometry.kv_heads, geometry.head_dim, tokens)
        return encoding_bytes(*sizes, dtype) + SELECTING_BYTES

    def _rows(self, geometry: Geometry) -> int:
        return geometry.kv_heads if self.per == "group" else geometry.query_heads

    def _scratch_bytes(self, geometry: Geometry, num_keys: int) -> int:
        rows = self._rows(geometry)
        return weighing_bytes(geometry.kv_heads, geometry.group, rows, num_keys)


class _Codes(FarIndex):
    def __init__(self, policy: Sketch, geometry: Geometry, budget: Budget, seed: int) -> None:
        self._policy = policy
        self._budget = budget
        self._seed = seed
        self._geometry = geometry
        self._weighing = Weighing(geometry.kv_heads, geometry.group, policy._rows(geometry))
        self._layers = [
            LayerSketch(geometry.kv_heads, geometry.head_dim, policy.bits)
            for _ in range(geometry.layers)
        ]

    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        self._layers[layer].extend(far)

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        budget = self._budget.keys(far.length)
        if budget == far.length:
            return ALL
        if self._policy.per == "head":
            budget = max(1, budget // self._geometry.group)
        temper = self._policy.exponent
        self._layers[layer].weigh(query, temper, self._weighing)
        keys = draw_keys(self._seed, layer, step, self._weighing.rows)
        return self._weighing.draw(budget, temper, keys)

    def mark(self) -> Any:
        return [layer.mark() for layer in self._layers]

    def rewind(self, mark: Any) -> None:
        for layer, saved in zip(self._layers, mark, strict=True):
            layer.rewind(saved)

    def index_bytes(self) -> int:
        longest = max(layer.length for layer in self._layers)
        scratch = self._policy._scratch_bytes(self._geometry, longest)
        return sum(layer.num_bytes for layer in self._layers) + scratch

    def form(self) -> Form:
        return {"index": "sketch", "bits": self._policy.bits, "layout": LAYOUT}

    def arrays(self) -> dict[str, NDArray[Any]]:
        layers = enumerate(self._layers)
        return {f"{i}.{name}": each for i, layer in layers for name, each in layer.arrays().items()}

    def restore(self, arrays: Mapping[str, NDArray[Any]], num_keys: int) -> None:
        for i, layer in enumerate(self._layers):
            layer.restore({name: arrays[f"{i}.{name}"] for name in STATE}, num_keys)
