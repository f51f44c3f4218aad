"""The tokens of one sequence: near and far KV entries of all layers, and the policy's index.

Near means the memory of the GPU, or of the CPU if there is no GPU; far means host memory. The state
of a layer is a `LayerState`, whose class the policy's traits decide once. A sequence has no
reference to a model: prefill and decode add keys and values to it and read its rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from nearfar.policies.base import PromptQueryStats, Watched
from nearfar.policies.index import Index, NearIndex
from nearfar.runtime.memory.evicting_state import EvictingState, Eviction, RaggedState
from nearfar.runtime.memory.far_memory import FarMark, FarMemory
from nearfar.runtime.memory.far_state import SPILL_TOKENS, FarState
from nearfar.runtime.memory.far_store import FarStore, SavedRows
from nearfar.runtime.memory.growing_state import GrowingState
from nearfar.runtime.memory.layer_state import LayerState
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.memory.near_store import NearLayer, new_near_layer
from nearfar.runtime.memory.sequence_settings import SequenceSettings

_numbers = itertools.count()


@dataclass(frozen=True)
class Mark:
    """A point in a sequence to which it can return."""

    tokens: int
    layers: tuple[Any, ...]
    far: FarMark
    evicted_summary: Any


class Sequence:
    """Near and far memory of one sequence under one policy."""

    def __init__(
        self,
        settings: SequenceSettings,
        ledger: Ledger,
        saved: SavedRows | None = None,
    ) -> None:
        """An empty sequence, or one with ``saved`` far rows."""
        self.settings = settings
        self.policy = settings.policy
        self.kept_by = self.policy.described()  # now: files that it names may change
        self.tokens = 0  # read so far
        self.far = _new_far(settings, ledger, saved)
        self.evicted_summary = self.policy.new_evicted_summary(settings.geometry, settings.device)
        merger = self.policy.new_merger(settings.geometry, settings.device)
        self.layers = _new_layers(self.far, Eviction(settings, self.evicted_summary, merger))
        self.near = [layer.near for layer in self.layers]
        self._number = next(_numbers)

    @property
    def next_position(self) -> int:
        """Rotary position of the next token, from the last layer, which gets a prompt last."""
        return self.near[-1].length if self.settings.counts_cache_slots else self.tokens

    @property
    def watched(self) -> tuple[Watched, ...]:
        """The statistics of the next prompt's queries that the policy needs."""
        traits = self.policy.traits
        has_settled = traits.evicts_once and self.tokens > 0
        return () if traits.watches == "nothing" or has_settled else (traits.watches,)

    @property
    def is_fixed_size(self) -> bool:
        """Whether steps drop as many near rows as they add, so that only their contents change."""
        return all(layer.is_fixed_size for layer in self.layers)

    @property
    def layout(self) -> Any:
        """Compares equal as long as the addresses of near rows and of a GPU index stay the same."""
        index = self.far.index.layout if isinstance(self.far.index, NearIndex) else None
        return self._number, tuple(layer.layout for layer in self.layers), index

    @property
    def near_bytes(self) -> int:
        """Bytes of near rows, all layers, and of an evicting policy's summary of dropped rows."""
        evicted_summary = 0 if self.evicted_summary is None else self.evicted_summary.num_bytes
        return evicted_summary + sum(layer.near_bytes for layer in self.layers)

    def announce_prompt(self, tokens: int) -> None:
        """Announce ``tokens`` new tokens, so that far memory and index can reserve room at once."""
        far = self.layers[0].held_tokens + tokens - self.settings.spared
        self.far.announce(far, self.settings.device)

    def absorb_prompt(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        stats: PromptQueryStats | None = None,
    ) -> None:
        """Add a prompt in one layer; arguments as of `LayerState.absorb`."""
        self.layers[layer].absorb(keys, values, stats, self.tokens)

    def append(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        position: int | torch.Tensor | None = None,
    ) -> None:
        """Add one generated token in one layer, ``key`` and ``value`` [Hkv, D].

        Its ``position`` is the number of tokens before it, as an int or as a tensor on the GPU.
        """
        self.layers[layer].append(key, value, self.tokens if position is None else position)

    def finish_step(self, new_tokens: int = 1) -> None:
        """Count tokens that all layers have; move tokens that left the window to far memory."""
        self.tokens += new_tokens
        self.far.store.settle()
        for layer in self.layers:
            layer.spill()

    def mark(self) -> Mark:
        """A point for `rewind`."""
        evicted_summary = None if self.evicted_summary is None else self.evicted_summary.mark()
        layers = tuple(layer.mark() for layer in self.layers)
        return Mark(self.tokens, layers, self.far.mark(), evicted_summary)

    def rewind(self, mark: Mark) -> None:
        """Drop everything read since ``mark``.

        Reading, or an earlier rewind, may have been interrupted at any moment.
        """
        self.tokens = mark.tokens
        for layer, saved in zip(self.layers, mark.layers, strict=True):
            layer.rewind(saved)
        if self.evicted_summary is not None:
            self.evicted_summary.restore(mark.evicted_summary)
        self.far.rewind(mark.far)

    def close(self) -> None:
        """Give far memory back."""
        self.far.store.close()


def _new_far(settings: SequenceSettings, ledger: Ledger, saved: SavedRows | None) -> FarMemory:
    capacity = settings.capacity_tokens if settings.policy.traits.keeps_far else 0
    store = FarStore(settings.geometry, settings.far_dtype, capacity, ledger, saved)
    return FarMemory(store, _new_index(settings))


def _new_index(settings: SequenceSettings) -> Index | None:
    needs = (settings.geometry, settings.budget, settings.seed)
    near = None
    if settings.near_selection:
        near = settings.policy.new_near_index(*needs, settings.device)
    return near or settings.policy.new_index(*needs)


def _new_layers(far: FarMemory, eviction: Eviction) -> list[LayerState]:
    """The states of all layers; no other place derives their classes from a policy's traits."""
    settings = eviction.settings
    traits, geometry, around = settings.policy.traits, settings.geometry, settings.spared
    evicts, place = traits.kind == "evicts", (settings.near_dtype, settings.device)
    kinds = {"with_positions": evicts, "with_scores": traits.needs_attention}

    def state(layer: int, near: NearLayer) -> LayerState:
        if traits.keeps_far:
            return FarState(near, layer, far, settings.sinks, settings.window)
        if evicts:
            return (RaggedState if traits.ragged else EvictingState)(near, layer, eviction)
        return GrowingState(near, settings.sinks, settings.window)

    rows = [
        new_near_layer(geometry, around + SPILL_TOKENS, place, **kinds)
        for _ in range(geometry.layers)
    ]
    return [state(layer, near) for layer, near in enumerate(rows)]
