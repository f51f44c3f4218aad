"""A layer with sinks and window in near (GPU) memory and all other rows in far (host) memory."""

from __future__ import annotations

import torch

from nearfar.policies.base import PromptQueryStats
from nearfar.records import ALL
from nearfar.runtime.memory.far_memory import FarMemory
from nearfar.runtime.memory.layer_state import LayerState
from nearfar.runtime.memory.near_store import NearLayer

SPILL_TOKENS = 64  # size of the blocks in which tokens leave the window for far memory


class FarState(LayerState):
    """Near rows are the first ``sinks`` tokens and at least the last ``window``."""

    def __init__(
        self, near: NearLayer, layer: int, far: FarMemory, sinks: int, window: int
    ) -> None:
        super().__init__(near)
        self._layer, self._far = layer, far
        self._sinks, self._window = sinks, window

    @property
    def held_tokens(self) -> int:
        """Tokens near and far."""
        return self.near.length + self._far_tokens

    @property
    def _far_tokens(self) -> int:
        return self._far.store.length(self._layer)

    def absorb(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        stats: PromptQueryStats | None,  # noqa: ARG002  selection uses later queries
        tokens: int,
    ) -> None:
        """Split all tokens, in order, into sinks, far rows and window."""
        total, old_far = keys.shape[1], self._far_tokens
        sinks = min(self._sinks, total)
        # an incomplete group stays near, in full precision, until it is complete
        count = max(0, total - self._window - sinks - old_far)
        window_start = sinks + old_far + count - count % self._far.store.group_tokens
        new = slice(sinks + old_far, window_start)
        self._far.add(self._layer, keys[:, new], values[:, new], is_first=tokens == 0)
        self.near.length = 0
        for part in (slice(0, sinks), slice(window_start, total)):
            self.near.extend(keys[:, part], values[:, part], part.start)

    def spill(self) -> None:
        """Move the oldest block of the window to far memory, once the window has a spare block."""
        near, first = self.near, self._sinks
        if near.length < first + self._window + SPILL_TOKENS:
            return
        leaving = slice(first, first + SPILL_TOKENS)
        keys, values = near.keys[:, leaving], near.values[:, leaving]
        self._far.add(self._layer, keys, values, is_first=False)
        near.drop_range(leaving.start, leaving.stop)

    def copy_past(self, rows: torch.Tensor) -> None:
        """Sinks, far rows and window, in token order."""
        far, near = self._far_tokens, self.near.rows[:, : self.near.length]
        sinks = self._sinks if far else self.near.length
        rows[:, :sinks] = near[:, :sinks]
        if far:
            self._far.store.verify(self._layer, ALL)
            self._far.store.bring(self._layer, rows[:, sinks : sinks + far])
        rows[:, sinks + far : far + self.near.length] = near[:, sinks:]

    def far_to_save(self) -> torch.Tensor:
        """Far rows as they are stored."""
        view = self._far.store.view(self._layer)
        return view.rows[:, : view.length]
