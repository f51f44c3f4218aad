"""What a policy may keep of the rows that it drops: a summary near, of a size that never grows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from nearfar.records import Partial

FOLDED_ROWS = 4096  # of a KV head at a time: features of a whole prompt's rows would fill memory


class EvictedSummary(ABC):
    """The summary of one sequence, over all layers. Dropped rows go in; each query gets a part.

    The part is merged with that of the rows that are kept by its log-sum-exp, as if it were of
    more rows.
    """

    @abstractmethod
    def fold(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in dropped rows, ``keys`` and ``values`` [Hkv, n, D]."""

    @abstractmethod
    def attend(self, layer: int, queries: torch.Tensor) -> Partial:
        """Output [Hq, T, D] and log-sum-exp [Hq, T] of ``queries`` [Hq, T, D], float32, scaled.

        The log-sum-exp is -inf where nothing was taken in.
        """

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """All that it holds, by name, each [layers, ...]; not copied."""

    @abstractmethod
    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Become what a copy of `state` holds."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.state().values())

    def mark(self) -> Any:
        """A copy of the state, for `restore`."""
        return {name: tensor.clone() for name, tensor in self.state().items()}
