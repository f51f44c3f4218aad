"""What one sequence has read: near and far keys and values of all layers, and the policy's index.

    selecting   near: sinks | window        far: everything between them, indexed
    exact       near: everything, or as a selecting policy whose selection is all far keys
    evicting    near: at most sinks + window + budget rows a KV head        far: nothing
    ragged      as evicting in the mean over a layer's heads: what they keep of the first prompt is
                in `ragged`, what comes later in `near`

A sequence knows no model: prefill and decode hand it keys and values and ask what to attend to.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from nearfar.policies.base import (
    Asked,
    FarIndex,
    Index,
    NearIndex,
    NearState,
    Watched,
)
from nearfar.records import ALL, NONE, Selection, Verification, Whole
from nearfar.runtime.memory.far_store import FarStore, SavedRows
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.memory.mark import Mark, SelectsFar
from nearfar.runtime.memory.near_store import new_near_layer
from nearfar.runtime.memory.ragged_rows import RaggedRows, ragged_rows
from nearfar.runtime.memory.sequence_settings import SequenceSettings
from nearfar.storage import bytes_read

SPILL_TOKENS = 64  # tokens leave the window for far memory in blocks of so many
_numbers = itertools.count()


class Sequence:
    """Near and far memory of one sequence under one policy."""

    def __init__(
        self,
        settings: SequenceSettings,
        like: torch.Tensor,
        ledger: Ledger,
        saved: SavedRows | None = None,
    ) -> None:
        self.settings = settings
        self.policy = settings.policy
        self.tokens = 0  # read so far
        self.far_rows_read = 0  # rows of one KV head, over all layers and steps
        self.far_groups_read = 0  # and groups that they are in, where these have something stored
        self._number = next(_numbers)
        traits, geometry = self.policy.traits, settings.geometry
        evicts = traits.kind == "evicts"
        rows = settings.sinks + settings.window + SPILL_TOKENS
        kinds = {"with_positions": evicts, "with_scores": traits.needs_attention}
        self.near = [new_near_layer(geometry, rows, like, **kinds) for _ in range(geometry.layers)]
        self.far = FarStore(
            geometry,
            settings.far_dtype,
            settings.capacity_tokens if traits.keeps_far else 0,
            ledger,
            saved,
        )
        self.index: Index | None = self._new_index(like.device)
        self.tracer: SelectsFar | None = None  # selects in the index's place, until a rewind
        self.remnant = self.policy.new_remnant(geometry, like.device)
        self._merger = self.policy.new_merger(geometry, like.device)
        self.kept_by = self.policy.described()  # as it was now: files that it names may change
        self.near_limit: int | None = None  # of an evicting policy; fixed by the first prompt
        self.ragged: list[RaggedRows | None] = [None] * geometry.layers

    @property
    def counts_cache_slots(self) -> bool:
        """Whether positions are slots of the near set; its keys are then stored unrotated."""
        return self.policy.traits.positions == "cache-index"

    @property
    def next_position(self) -> int:
        """Rotary position of the next token; of the last layer, which takes in a prompt last."""
        return self.near[-1].length if self.counts_cache_slots else self.tokens

    @property
    def reads_everything(self) -> bool:
        """Whether every step reads all far keys, so that nothing is selected."""
        return self.policy.traits.kind == "exact" and self.policy.traits.keeps_far

    @property
    def watched(self) -> tuple[Watched, ...]:
        """What the next prompt's queries are watched for."""
        watches = self.policy.traits.watches
        return () if watches == "nothing" or self._has_settled else (watches,)

    @property
    def is_steady(self) -> bool:
        """Whether steps drop near rows as they add them: nothing changes but what rows hold."""
        traits = self.policy.traits
        if traits.kind != "evicts" or traits.evicts_once or self._merger is not None:
            return False
        limit = self.near_limit
        return limit is not None and all(
            near.length == self.settings.layer_limit(limit, layer)
            for layer, near in enumerate(self.near)
        )

    @property
    def layout(self) -> Any:
        """Compares equal as long as near rows and a near index lie where they lay."""
        near = tuple(layer.moves for layer in self.near)
        ragged = tuple(None if rows is None else rows.number for rows in self.ragged)
        index = self.index.layout if isinstance(self.index, NearIndex) else None
        return self._number, near, ragged, index

    @property
    def far_bytes_read(self) -> int:
        """Bytes of far rows that decode steps have read, all layers."""
        read = (self.far_rows_read, self.far_groups_read)
        return bytes_read(self.far.dtype, self.settings.geometry.head_dim, *read)

    @property
    def near_bytes(self) -> int:
        """Bytes of near rows, all layers."""
        others = sum(each.rows.nbytes for each in self.ragged if each is not None)
        if self.remnant is not None:
            others += self.remnant.num_bytes
        return others + sum(layer.rows[:, : layer.length].nbytes for layer in self.near)

    @property
    def index_bytes(self) -> int:
        """Bytes of the policy's index."""
        return 0 if self.index is None else self.index.index_bytes()

    def announce_prompt(self, tokens: int) -> None:
        """Say that so many tokens come, so that far memory and index can make room at once."""
        settings = self.settings
        if self.index is None:
            return
        far = self.held_tokens(0) + tokens - settings.sinks - settings.window
        if far > self.far.length(0):
            self.index.expect(far)
            self.far.announce(far - self.far.length(0), self.near[0].rows.device)

    def held_tokens(self, layer: int) -> int:
        """Tokens of a layer that are near or far; those of `ragged` are not among them."""
        return self.near[layer].length + self.far.length(layer)

    def near_positions(self, layer: int) -> list[torch.Tensor]:
        """Positions of what each KV head of an evicting policy has near, in any order."""
        near, ragged = self.near[layer], self.ragged[layer]
        assert near.positions is not None
        later = list(near.positions[:, : near.length])
        if ragged is None:
            return later
        return [torch.cat(both) for both in zip(ragged.head_positions, later, strict=True)]

    def copy_past(self, layer: int, rows: torch.Tensor) -> None:
        """Write what a layer holds to the front of ``rows`` [Hkv, >= held_tokens, 2 D].

        Rows are as stored: in token order unless the policy evicts.
        """
        near, far = self.near[layer], self.far.length(layer)
        near_rows = near.rows[:, : near.length]
        sinks = self.settings.sinks if far else near.length
        end = sinks + far
        rows[:, :sinks] = near_rows[:, :sinks]
        if far:
            self.far.expect(layer, ALL)
            self.far.bring(layer, rows[:, sinks:end])
        rows[:, end : end + near.length - sinks] = near_rows[:, sinks:]

    def absorb_prompt(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        asked: Asked | None = None,
    ) -> None:
        """Take in a prompt of one layer after it was read with exact attention.

        ``keys`` and ``values`` [Hkv, N, D] are what the layer held and then the prompt; ``asked``
        is what the prompt's queries tell about them, where the policy watches.
        """
        near = self.near[layer]
        past_tokens = self.held_tokens(layer)
        if self.policy.traits.keeps_far:
            self._split(layer, keys, values)
            return
        near.extend(keys[:, past_tokens:], values[:, past_tokens:], self.tokens)
        if self._has_settled:
            return
        scores = None
        if asked is not None:
            scores = self.policy.score_prompt(self._near_state(layer), asked)
            if near.scores is not None:
                near.scores[:, : near.length] = scores
        self.evict(layer, scores)

    def add_far(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put tokens [Hkv, n, D] of one layer into far memory and the index, behind those there.

        For contexts that are made and not read: as if these had come before the window.
        """
        self._to_far(layer, keys, values)

    def append(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        position: int | torch.Tensor | None = None,
    ) -> None:
        """Take in one generated token of one layer, ``key`` and ``value`` [Hkv, D].

        Its ``position`` is the number of tokens before it, here or near.
        """
        position = self.tokens if position is None else position
        self.near[layer].extend(key[:, None], value[:, None], position)

    def reserve_token(self) -> None:
        """Make room near for one more token of every layer."""
        for near in self.near:
            near.reserve(near.length + 1)

    def took_token(self) -> None:
        """One token's keys and values were written behind the near rows of every layer."""
        for near in self.near:
            near.take_in(self.tokens)

    def select(self, layer: int, query: torch.Tensor) -> Selection | Whole:
        """Far keys that ``query`` [Hq, D] float32 on the CPU, scaled, shall read."""
        far = self.far.view(layer)
        if far.length == 0:
            return NONE
        assert self.index is not None
        if self.index.form() is None:  # it may look at any row
            self.far.expect(layer, ALL)
        selects = self.tracer
        if selects is None:
            assert isinstance(self.index, FarIndex)
            selects = self.index
        selection = selects.select(layer, query, far, self.tokens)
        self.far.expect(layer, selection)
        return selection

    def take_account(self) -> Verification | None:
        """What a policy that estimates its own error found since the last call."""
        return self.index.take_account() if isinstance(self.index, FarIndex) else None

    def observe(self, layer: int, attention: torch.Tensor) -> None:
        """Let the policy score near rows by the ``attention`` [Hq, N] they just got."""
        near = self.near[layer]
        assert near.scores is not None
        old = near.scores[:, : near.length]
        near.scores[:, : near.length] = self.policy.update_scores(old, attention)

    def evict(self, layer: int, scores: torch.Tensor | None = None) -> None:
        """Bring a layer's near set down to the limit of an evicting policy.

        ``scores`` [Hkv, length] are those of a prompt that was just read.
        """
        near = self.near[layer]
        if near.positions is None or self._has_settled:
            return
        state = self._near_state(layer, scores)
        if near.length <= state.limit:
            return
        if self._merger is not None:
            near.replace(self._merger(state), state.limit)
            return
        if not self.policy.traits.ragged:
            victims = self.policy.victims(state)
            if self.remnant is not None:
                self.remnant.fold(layer, *near.pick(victims))
            near.drop(victims, in_place=self.tokens > 0)  # what is read later is a question
            return
        kept, group = self.policy.kept(state), self.settings.geometry.group
        self.ragged[layer] = ragged_rows(near.rows[:, : near.length], state.positions, kept, group)
        near.clear()

    @property
    def _has_settled(self) -> bool:
        """Whether an evicting policy has decided for ever what stays."""
        return self.policy.traits.evicts_once and self.tokens > 0

    def _near_state(self, layer: int, scores: torch.Tensor | None = None) -> NearState:
        near, settings = self.near[layer], self.settings
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
            settings.layer_limit(self.near_limit, layer),
            near.keys,
            near.values,
            layer,
        )

    def finish_step(self, new_tokens: int = 1) -> None:
        """Count tokens that all layers took in; move what left the window to far memory."""
        self.tokens += new_tokens
        if not self.policy.traits.keeps_far:
            return
        self.far.settle()
        sinks, window = self.settings.sinks, self.settings.window
        if self.near[0].length < sinks + window + SPILL_TOKENS:
            return
        for layer, near in enumerate(self.near):
            leaving = slice(sinks, sinks + SPILL_TOKENS)
            self._to_far(layer, near.keys[:, leaving], near.values[:, leaving])
            near.drop_range(leaving.start, leaving.stop)

    def mark(self) -> Mark:
        """A point for `rewind`."""
        evicts, keeps_far = self.policy.traits.kind == "evicts", self.policy.traits.keeps_far
        rewritten = evicts or keeps_far  # otherwise near rows only ever grow
        return Mark(
            self.tokens,
            [layer.snapshot() if rewritten else layer.length for layer in self.near],
            self.far.mark(),
            None if self.index is None else self.index.mark(),
            tuple(self.ragged),
            None if self.remnant is None else self.remnant.mark(),
            self.near_limit,
        )

    def rewind(self, mark: Mark) -> None:
        """Forget what was read since ``mark``, as if it had never been.

        What was read may have been interrupted at any moment, an earlier return here too.
        """
        self.tracer = None
        self.tokens, self.near_limit = mark.tokens, mark.near_limit
        for layer, saved in zip(self.near, mark.near, strict=True):
            layer.restore(saved)
        self.far.rewind(mark.far)
        self.ragged = list(mark.ragged)
        if self.remnant is not None:
            self.remnant.restore(mark.remnant)
        if self.index is not None:
            self.index.rewind(mark.index)

    def close(self) -> None:
        """Give far memory back."""
        self.far.close()

    def _new_index(self, device: torch.device) -> Index | None:
        settings = self.settings
        needs = (settings.geometry, settings.budget, settings.seed)
        near = self.policy.new_near_index(*needs, device) if settings.near_selection else None
        return near or self.policy.new_index(*needs)

    def _split(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Lay a layer's tokens, all of them in order, into sinks, far and window."""
        total = keys.shape[1]
        sinks = min(self.settings.sinks, total)
        old_far = self.far.length(layer)
        # what does not fill a group stays near, in full precision, until it does
        count = max(0, total - self.settings.window - sinks - old_far)
        window_start = sinks + old_far + count - count % self.far.group_tokens
        new_far = slice(sinks + old_far, window_start)
        self._to_far(layer, keys[:, new_far], values[:, new_far])
        near = self.near[layer]
        near.length = 0
        for part in (slice(0, sinks), slice(window_start, total)):
            near.extend(keys[:, part], values[:, part], part.start)

    def _to_far(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if keys.shape[1] == 0:
            return
        self.far.append(layer, keys, values)
        if self.index is not None:
            # an index near takes the keys of a first prompt from near, while they are copied
            if self.tokens or not isinstance(self.index, NearIndex):
                self.far.settle()
            self.index.extend(layer, self.far.view(layer), keys)
