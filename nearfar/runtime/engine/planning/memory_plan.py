"""The peak near (GPU) and far (host) memory of a context, predicted before it is read.

`memory_setup` gives the sizes of stored rows, `working_memory` the temporary memory of prefill and
questions. `planner` decides whether a plan fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from nearfar.config import GIB, format_bytes
from nearfar.runtime.engine.planning.memory_setup import MemorySetup
from nearfar.runtime.engine.planning.working_memory import (
    asking_bytes,
    index_work_bytes,
    reading_bytes,
)

# CUDA's own memory: its context, loaded kernels, graphs; 0.83 GiB were measured
CONTEXT_BYTES = GIB


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes for ``sequences`` contexts of ``context_tokens`` under one policy."""

    context_tokens: int
    weight_bytes: int
    near_kv_bytes: int
    prefill_bytes: int  # near, temporary, during prefill
    far_bytes: int
    index_bytes: int  # on the host
    near_index_bytes: int = 0  # an index on a GPU, and the temporary memory of its selection
    context_bytes: int = 0  # of CUDA itself
    host_weight_bytes: int = 0  # an embedding of which a token reads one row: not on the GPU
    asking_bytes: int = 0  # near, temporary, during a question and its answer
    index_work_bytes: int = 0  # on a GPU's host, while an index is built, grows or selects

    @property
    def near_bytes(self) -> int:
        """Peak near memory."""
        held = self.weight_bytes + self.near_kv_bytes + self.near_index_bytes
        return held + max(self.prefill_bytes, self.asking_bytes) + self.context_bytes

    @property
    def host_bytes(self) -> int:
        """Peak far memory: keys, values and index."""
        return self.far_bytes + self.index_bytes + self.index_work_bytes

    def near_parts(self) -> str:
        """The parts of near memory, in words."""
        reads = self.prefill_bytes >= self.asking_bytes
        parts = {
            "weights": self.weight_bytes,
            "near keys and values": self.near_kv_bytes,
            "near index": self.near_index_bytes,
            "reading the prompt" if reads else "asking": max(self.prefill_bytes, self.asking_bytes),
            "CUDA": self.context_bytes,
        }
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)

    def far_parts(self) -> str:
        """The parts of far memory, in words."""
        parts = f"far keys and values {format_bytes(self.far_bytes)}, index "
        parts += format_bytes(self.index_bytes)
        if self.index_work_bytes:
            parts += f", building the index {format_bytes(self.index_work_bytes)}"
        return parts


def plan_memory(setup: MemorySetup, context_tokens: int, sequences: int = 1) -> MemoryPlan:
    """Predict the bytes of ``sequences`` contexts, read one after another, decoded together."""
    model, policy, item = setup.model, setup.policy, setup.dtype.itemsize
    geometry, far_tokens = model.geometry, setup.far_tokens(context_tokens)
    host_weights = 0
    if setup.on_gpu and not model.tied_embeddings:
        host_weights = model.vocab_size * model.hidden_size * item
    near_rows = geometry.layers * setup.near_tokens(context_tokens) * setup.row_bytes
    near_index = policy.predict_near_index_bytes if setup.near_index else None
    host_index = None if setup.near_index else policy.predict_index_bytes
    host_work = 0
    if setup.on_gpu and host_index:
        host_work = index_work_bytes(setup, far_tokens) + setup.index_growth_bytes(context_tokens)
    return MemoryPlan(
        context_tokens,
        model.weight_bytes(item) - host_weights,
        sequences * (near_rows + policy.predict_evicted_summary_bytes(geometry)),
        reading_bytes(setup, 0, context_tokens),
        sequences * setup.far_bytes(context_tokens),
        sequences * host_index(geometry, far_tokens) if host_index else 0,
        sequences * near_index(geometry, far_tokens) if near_index else 0,
        CONTEXT_BYTES if setup.on_gpu else 0,
        host_weights,
        asking_bytes(setup, context_tokens),
        host_work,
    )


def plan_opened(setup: MemorySetup, context_tokens: int, mapped_bytes: int) -> MemoryPlan:
    """The plan of a saved document, with ``mapped_bytes`` of its far rows in a file."""
    plan = plan_memory(setup, context_tokens)
    return replace(plan, prefill_bytes=0, far_bytes=max(0, plan.far_bytes - mapped_bytes))


def plan_extended(setup: MemorySetup, held_tokens: int, context_tokens: int) -> MemoryPlan:
    """The additional memory of a document that grows from ``held_tokens`` to ``context_tokens``.

    An index and the rows of an evicting policy count twice: a mark keeps the old ones.
    """
    context_tokens = max(context_tokens, held_tokens)
    plan, held = plan_memory(setup, context_tokens), plan_memory(setup, held_tokens)
    past = setup.near_tokens(held_tokens) + setup.far_tokens(held_tokens)
    reading = reading_bytes(setup, past, context_tokens - held_tokens)
    near = plan.near_kv_bytes - (0 if setup.evicts else held.near_kv_bytes)
    return replace(
        plan,
        near_kv_bytes=max(0, near),
        prefill_bytes=reading + setup.growth_bytes(held_tokens),
        far_bytes=max(0, plan.far_bytes - held.far_bytes),
    )


def together(plans: Iterable[MemoryPlan]) -> MemoryPlan:
    """The plan of contexts of one setup that are read one after another and then all stay."""
    total, *others = plans
    for plan in others:
        total = replace(
            total,
            context_tokens=max(total.context_tokens, plan.context_tokens),
            near_kv_bytes=total.near_kv_bytes + plan.near_kv_bytes,
            prefill_bytes=max(total.prefill_bytes, plan.prefill_bytes),
            far_bytes=total.far_bytes + plan.far_bytes,
            index_bytes=total.index_bytes + plan.index_bytes,
            near_index_bytes=total.near_index_bytes + plan.near_index_bytes,
            asking_bytes=max(total.asking_bytes, plan.asking_bytes),
            index_work_bytes=max(total.index_work_bytes, plan.index_work_bytes),
        )
    return total
