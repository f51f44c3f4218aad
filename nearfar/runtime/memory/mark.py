"""A point to which a sequence can return, and what may select in its index's place until then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nearfar.records import FarView, Selection, Whole
from nearfar.runtime.memory.near_store import NearLayer
from nearfar.runtime.memory.ragged_rows import RaggedRows


@dataclass(frozen=True)
class Mark:
    """A point in a sequence to which it can return."""

    tokens: int
    near: list[NearLayer | int]
    far: tuple[int, ...]
    index: Any
    ragged: tuple[RaggedRows | None, ...]
    remnant: Any
    near_limit: int | None


class SelectsFar(Protocol):
    """What chooses far keys, as `nearfar.policies.base.FarIndex` does."""

    def select(self, layer: int, query: torch.Tensor, far: FarView, step: int) -> Selection | Whole:
        """Far keys that ``query`` [Hq, D] reads."""
