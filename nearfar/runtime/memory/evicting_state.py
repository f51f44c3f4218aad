"""A layer of an evicting policy: a bounded set of near (GPU) rows, and no far rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nearfar.policies.base import Merger, NearState, PromptQueryStats
from nearfar.policies.evicted_summary import FOLDED_ROWS, EvictedSummary
from nearfar.runtime.memory.layer_state import LayerState
from nearfar.runtime.memory.near_store import NearLayer, lengths_of
from nearfar.runtime.memory.ragged_rows import RaggedRows, as_layer, ragged_rows
from nearfar.runtime.memory.sequence_settings import SequenceSettings


@dataclass(frozen=True)
class Eviction:
    """The settings that all layers of a sequence share, and the destination of dropped rows."""

    settings: SequenceSettings
    evicted_summary: EvictedSummary | None  # summarises dropped rows
    merger: Merger | None  # replaces rows by fewer and drops none


class EvictionMark(NamedTuple):
    """A point to which a layer can return."""

    near: NearLayer
    near_limit: int | None
    ragged: RaggedRows | None


class EvictingState(LayerState):
    """Keeps at most as many rows as the budget and the first prompt's length allow."""

    def __init__(self, near: NearLayer, layer: int, eviction: Eviction) -> None:
        super().__init__(near)
        self._layer, self._eviction = layer, eviction
        self._policy = eviction.settings.policy

    @property
    def is_fixed_size(self) -> bool:
        """Whether the near set is full, and every step drops a row."""
        if self._policy.traits.evicts_once or self._eviction.merger is not None:
            return False
        limit = self.near_limit
        return limit is not None and self.near.length == self._limit(limit)

    def absorb(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        stats: PromptQueryStats | None,
        tokens: int,
    ) -> None:
        """Add the prompt, score it if the policy uses scores, and evict."""
        near = self.near
        near.take_prompt(keys, values, tokens)
        if self._has_settled(tokens):
            return
        scores = None
        if stats is not None:
            scores = self._policy.score_prompt(self._view(), stats)
            if near.scores is not None:
                near.scores[:, : near.length] = scores
        self._evict(tokens, scores)

    def observe(self, attention: torch.Tensor) -> None:
        """Let the policy score near rows by the ``attention`` [Hq, N] of the last token."""
        near = self.near
        assert near.scores is not None
        old = near.scores[:, : near.length]
        near.scores[:, : near.length] = self._policy.update_scores(old, attention)

    def evict(self, tokens: int) -> None:
        """Drop rows until the near set is within its limit."""
        if not self._has_settled(tokens):
            self._evict(tokens)

    def mark(self) -> Any:
        """A copy of the rows."""
        return EvictionMark(self.near.snapshot(), self.near_limit, self.ragged)

    def rewind(self, mark: EvictionMark) -> None:
        """Restore the rows, the limit and the ragged rows."""
        self.near_limit, self.ragged = mark.near_limit, mark.ragged
        self.near.restore(mark.near)

    def take_saved(self, rows: NearLayer, near_limit: int | None) -> None:
        """Take rows with their positions and scores; all heads have equally many."""
        assert rows.positions is not None
        lengths = lengths_of(rows.positions)
        if lengths != [lengths[0]] * len(lengths):
            raise ValueError("its heads keep different numbers of keys; its policy forbids that")
        rows.length = lengths[0]
        super().take_saved(rows, near_limit)
        near = self.near
        assert near.positions is not None
        near.positions[:, : near.length] = rows.positions[:, : near.length]
        if near.scores is not None:
            assert rows.scores is not None
            near.scores[:, : near.length] = rows.scores[:, : near.length]

    def _has_settled(self, tokens: int) -> bool:
        """Whether the policy evicts nothing any more."""
        return self._policy.traits.evicts_once and tokens > 0

    def _evict(self, tokens: int, scores: torch.Tensor | None = None) -> None:
        """Evict; ``scores`` [Hkv, length] are the scores of a prompt that was just read."""
        state = self._view(scores)
        if self.near.length <= state.limit:
            return
        if self._eviction.merger is not None:
            self.near.replace(self._eviction.merger(state), state.limit)
        else:
            self._drop(state, tokens)

    def _drop(self, state: NearState, tokens: int) -> None:
        victims = self._policy.victims(state)
        if self._eviction.evicted_summary is not None:
            # a prompt's rows are not copied at once
            for first in range(0, victims.shape[1], FOLDED_ROWS):
                some = victims[:, first : first + FOLDED_ROWS]
                self._eviction.evicted_summary.fold(self._layer, *self.near.pick(some))
        self.near.drop(victims, in_place=tokens > 0)  # every later prompt is a question

    def _view(self, scores: torch.Tensor | None = None) -> NearState:
        near, settings = self.near, self._eviction.settings
        assert near.positions is not None
        if self.near_limit is None:
            self.near_limit = settings.near_limit(near.length)
        if scores is None and near.scores is not None:
            scores = near.scores[:, : near.length]
        return NearState(
            near.positions[:, : near.length],
            scores,
            settings.sinks,
            settings.window,
            self._limit(self.near_limit),
            near.keys,
            near.values,
            self._layer,
        )

    def _limit(self, near_limit: int) -> int:
        return self._eviction.settings.layer_limit(near_limit, self._layer)


class RaggedState(EvictingState):
    """The rows that heads keep of the first prompt are in `ragged`; later rows are near."""

    @property
    def near_bytes(self) -> int:
        """Bytes of ragged and near rows."""
        return super().near_bytes + (0 if self.ragged is None else self.ragged.rows.nbytes)

    @property
    def layout(self) -> Any:
        """Changes with the ragged rows too."""
        return super().layout, None if self.ragged is None else self.ragged.number

    @property
    def positions(self) -> list[torch.Tensor]:
        """Positions of ragged and near rows."""
        later = super().positions
        if self.ragged is None:
            return later
        return [torch.cat(both) for both in zip(self.ragged.head_positions, later, strict=True)]

    def near_to_save(self) -> NearLayer:
        """Ragged and near rows in one layer; short heads end at position -1."""
        return as_layer(self.ragged, self.near)

    def take_saved(self, rows: NearLayer, near_limit: int | None) -> None:
        """Take rows as ragged ones if heads have different numbers, else as near ones."""
        assert rows.positions is not None
        lengths = lengths_of(rows.positions)
        if lengths == [rows.length] * len(lengths):
            super().take_saved(rows, near_limit)
            return
        self.near_limit = near_limit
        device, group = self.near.rows.device, self._eviction.settings.geometry.group
        positions = rows.positions.to(device)
        kept = positions >= 0
        self.ragged = ragged_rows(rows.rows.to(device), positions, kept, group)
        self.near.clear()

    def _drop(self, state: NearState, tokens: int) -> None:  # noqa: ARG002  it happens once
        near, group = self.near, self._eviction.settings.geometry.group
        kept = self._policy.kept(state)
        self.ragged = ragged_rows(near.rows[:, : near.length], state.positions, kept, group)
        near.clear()
