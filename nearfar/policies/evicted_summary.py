"""The summary that a policy may keep near of dropped rows, of constant size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from nearfar.records import Partial

FOLDED_ROWS = 4096  # of a KV head at a time: features of a whole prompt's rows would fill memory


class EvictedSummary(ABC):
    """The summary of one sequence, over all layers. It takes dropped rows; each query reads it.

    The result is merged with that of the kept rows by log-sum-exp, as if the summary were more
    rows.
    """

    @abstractmethod
    def fold(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add dropped rows, ``keys`` and ``values`` [Hkv, n, D]."""

    @abstractmethod
    def attend(self, layer: int, queries: torch.Tensor) -> Partial:
        """Output [Hq, T, D] and log-sum-exp [Hq, T] of ``queries`` [Hq, T, D], float32, scaled.

        The log-sum-exp is -inf if no row was added.
        """

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """All arrays by name, each [layers, ...]; not copied."""

    @abstractmethod
    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a copy of `state`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.state().values())

    def mark(self) -> Any:
        """A copy of the state, for `restore`."""
        return {name: tensor.clone() for name, tensor in self.state().items()}
