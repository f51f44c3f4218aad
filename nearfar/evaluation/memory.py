"""The bytes of one context under a policy: held bytes beside predicted ones.

A context of random keys and values is stored as if it had been read. Held bytes are those of the
arrays, reserves included, directly after the context was stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from nearfar.evaluation.synthetic import random_context
from nearfar.policies.index import NearIndex
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.far_state import SPILL_TOKENS
from nearfar.runtime.memory.near_store import NearLayer, growth_tokens
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.weights import total_bytes


@dataclass(frozen=True)
class Part:
    """One kind of bytes."""

    tier: str  # near or far
    name: str
    predicted_bytes: int  # from sizes alone, before anything is allocated
    held_bytes: int

    @property
    def error(self) -> float:
        """The error of the prediction relative to the held bytes."""
        if self.predicted_bytes == self.held_bytes:
            return 0.0
        return abs(self.predicted_bytes - self.held_bytes) / max(1, self.held_bytes)


@dataclass(frozen=True)
class Inventory:
    """All parts under one policy."""

    policy: str
    context_tokens: int
    parts: tuple[Part, ...]

    @property
    def total(self) -> Part:
        """The sum."""
        predicted = sum(part.predicted_bytes for part in self.parts)
        return Part("", "all", predicted, sum(part.held_bytes for part in self.parts))


def inventory(engine: Engine, context_tokens: int) -> Inventory:
    """Store a context under the engine's policy and count.

    Raises OutOfMemoryError where it does not fit.
    """
    engine.check_memory(context_tokens)
    sequence = random_context(engine, context_tokens)
    parts = (*_near(engine, sequence, context_tokens), *_far(engine, sequence, context_tokens))
    sequence.close()
    name = engine.config.policy
    return Inventory(name, context_tokens, tuple(p for p in parts if p.held_bytes))


def _near(engine: Engine, sequence: Sequence, tokens: int) -> list[Part]:
    plan = engine.plan(tokens)
    ragged = [layer.ragged for layer in sequence.layers if layer.ragged is not None]
    rows = sum(layer.rows.nbytes for layer in sequence.near)
    rows += sum(layer.rows.nbytes for layer in ragged)
    notes = sum(_note_bytes(layer) for layer in sequence.near)
    notes += sum(layer.positions.nbytes for layer in ragged)
    geometry, setup = engine.model_config.geometry, engine.room.setup
    near_rows = sum(_near_capacity(sequence, tokens, i) for i in range(geometry.layers))
    weights = total_bytes(engine.decoder.weights)
    parts = [
        Part("near", "weights", plan.weight_bytes + plan.host_weight_bytes, weights),
        Part("near", "keys and values", near_rows * setup.row_bytes, rows),
        Part("near", "positions and scores", near_rows * setup.note_bytes, notes),
    ]
    if sequence.evicted_summary is not None:
        predicted = engine.policy.predict_evicted_summary_bytes(geometry)
        parts.append(Part("near", "evicted summary", predicted, sequence.evicted_summary.num_bytes))
    if isinstance(sequence.far.index, NearIndex):
        held = sequence.far.index_bytes
        parts.append(Part("near", "index", plan.near_index_bytes, held))
    return parts


def _near_capacity(sequence: Sequence, tokens: int, layer: int) -> int:
    """Near rows that are reserved for a KV head in ``layer`` after ``tokens`` were added."""
    settings, traits = sequence.settings, sequence.policy.traits
    first = settings.spared + SPILL_TOKENS
    if traits.keeps_far or tokens <= first:
        return first
    if traits.kind == "evicts":
        limit = settings.layer_limit(settings.near_limit(tokens), layer)
        if tokens > limit:
            return limit
    return max(tokens, first + growth_tokens(first))


def _note_bytes(layer: NearLayer) -> int:
    return sum(each.nbytes for each in (layer.positions, layer.scores) if each is not None)


def _far(engine: Engine, sequence: Sequence, tokens: int) -> list[Part]:
    plan = engine.plan(tokens)
    parts = [Part("far", "keys and values", plan.far_bytes, sequence.far.store.num_bytes)]
    if not isinstance(sequence.far.index, NearIndex):
        parts.append(Part("far", "index", plan.index_bytes, sequence.far.index_bytes))
    return parts
