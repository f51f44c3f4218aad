"""A layer that keeps every row in near (GPU) memory: exact attention without far memory."""

from __future__ import annotations

import torch

from nearfar.policies.base import PromptQueryStats
from nearfar.runtime.memory.layer_state import LayerState
from nearfar.runtime.memory.near_store import NearLayer


class GrowingState(LayerState):
    """All rows near, in token order. A file stores those between sinks and window as far rows."""

    only_grows = True

    def __init__(self, near: NearLayer, sinks: int, window: int) -> None:
        super().__init__(near)
        self._sinks, self._window = sinks, window

    def absorb(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        stats: PromptQueryStats | None,  # noqa: ARG002  all rows are read
        tokens: int,
    ) -> None:
        """Add the prompt."""
        self.near.take_prompt(keys, values, tokens)

    def mark(self) -> int:
        """The number of rows, which suffices because rows only grow."""
        return self.near.length

    def rewind(self, mark: int) -> None:
        """Drop the rows behind the mark."""
        self.near.length = mark

    def since(self, mark: int) -> NearLayer:
        """The rows behind the mark, copied."""
        rows = self.near.rows[:, mark : self.near.length].clone()
        return NearLayer(rows, rows.shape[1])

    def put_back(self, rows: NearLayer) -> None:
        """Add rows that were behind the mark."""
        self.near.extend(rows.keys, rows.values, self.near.length)

    def near_to_save(self) -> NearLayer:
        """Sinks and window."""
        start, stop = self._middle()
        rows = self.near.rows
        around = torch.cat([rows[:, :start], rows[:, stop : self.near.length]], 1)
        return NearLayer(around, around.shape[1])

    def far_to_save(self) -> torch.Tensor:
        """The rows between sinks and window."""
        start, stop = self._middle()
        return self.near.rows[:, start:stop]

    def _middle(self) -> tuple[int, int]:
        start = min(self._sinks, self.near.length)
        return start, max(start, self.near.length - self._window)
