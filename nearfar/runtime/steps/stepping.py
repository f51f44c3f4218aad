"""How a batch decodes one step: on a GPU by captured graphs, elsewhere launch by launch.

    micro-batches   a GPU, and decode evicts nothing: kernels that read tables of addresses
    fixed size      a GPU, and every step evicts as many rows as it adds: captured tensor code
    eager           all other cases: a CPU, or rows that are merged from time to time

A GPU replays a captured graph without Python, which takes most of the time of small launches.
"""

from __future__ import annotations

from collections import abc
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nearfar.errors import InvalidOptionError
from nearfar.policies.base import Policy
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.steps.decode import decode_step
from nearfar.runtime.steps.timeline import Timeline
from nearfar.storage import token_bytes

if TYPE_CHECKING:
    from nearfar.runtime.steps.gpu.fixed_size import FixedSizeStep
    from nearfar.runtime.steps.gpu.micro_batches import MicroBatches

ROOM_TOKENS = 4096  # spare far keys in micro-batches, so that they are not made anew too soon


def far_micro_batches(batch: int) -> int:
    """Micro-batches in which a GPU decodes a batch of sequences with far memory."""
    return 2 if batch % 2 == 0 else 1


def suits_micro_batches(policy: Policy, row_bytes: int) -> bool:
    """Whether near rows only grow during decode, and attention reads nothing but rows.

    Ragged rows of all heads are end to end in memory, and kernels need each head to start at a
    multiple of 16 bytes.
    """
    traits, kind = policy.traits, type(policy)
    if traits.kind != "evicts":
        return True
    drops = kind.new_evicted_summary is Policy.new_evicted_summary
    plain = drops and kind.new_merger is Policy.new_merger
    rotated = traits.positions == "absolute"
    aligned = row_bytes % 16 == 0 or not traits.ragged
    return traits.evicts_once and rotated and plain and aligned


class Stepper:
    """Steps batches of sequences of one engine."""

    def __init__(
        self, decoder: Decoder, threads: int, *, by_micro_batches: bool, by_graphs: bool = False
    ) -> None:
        self._decoder = decoder
        self._threads = threads
        self.by_micro_batches = by_micro_batches
        self._by_graphs = by_graphs  # if not by micro-batches
        self._micro_batches: MicroBatches | None = None
        self._steady: FixedSizeStep | None = None
        self._last_layout: Any = None  # of the last batch whose sequences were all steady

    @classmethod
    def of(cls, decoder: Decoder, threads: int, policy: Policy) -> Stepper:
        """The stepper that suits ``policy`` and the decoder's device."""
        on_gpu = decoder.device.type == "cuda"
        row_bytes = token_bytes(decoder.dtype, decoder.plan.geometry.head_dim)
        by_micro_batches = on_gpu and suits_micro_batches(policy, row_bytes)
        return cls(decoder, threads, by_micro_batches=by_micro_batches, by_graphs=on_gpu)

    def step(self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int]) -> Tensor:
        """Logits [B, V] float32 after ``token_ids``, the newest token of each sequence."""
        return self._step(sequences, token_ids, traced=False)[0]

    def traced_step(
        self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int]
    ) -> tuple[Tensor, Timeline]:
        """`step`, and when its stages ran; only if a GPU decodes in micro-batches."""
        logits, timeline = self._step(sequences, token_ids, traced=True)
        if timeline is None:
            raise InvalidOptionError(
                "Stages can be timed only on a GPU, under a policy that evicts nothing during "
                "decode. Use --device cuda and another --policy."
            )
        return logits, timeline

    def _step(
        self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int], *, traced: bool
    ) -> tuple[Tensor, Timeline | None]:
        if not self.by_micro_batches:
            return self._step_evicting(sequences, token_ids), None
        for sequence in sequences:
            sequence.far.store.verify_all()  # all rows: the host does not see which are selected
            for near in sequence.near:
                near.reserve(near.length + 1)
        micro_batches = self._micro_batches_for(sequences)
        timeline = None
        try:
            if traced:
                logits, timeline = micro_batches.traced_step(sequences, token_ids)
            else:
                logits = micro_batches.step(sequences, token_ids)
        except BaseException:
            self.close()
            raise
        for sequence in sequences:
            sequence.finish_step()
        return logits, timeline

    def _step_evicting(
        self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int]
    ) -> Tensor:
        steady = self._by_graphs and all(sequence.is_fixed_size for sequence in sequences)
        layout = tuple(sequence.layout for sequence in sequences) if steady else None
        if layout is None or layout != self._last_layout:
            # the first step of a layout runs eagerly: it reserves rows and compiles kernels
            self._last_layout, self._steady = layout, None
            ids = torch.tensor(token_ids, device=self._decoder.device)
            return decode_step(self._decoder, sequences, ids)
        if self._steady is None:
            from nearfar.runtime.steps.gpu.fixed_size import FixedSizeStep

            self._steady = FixedSizeStep(self._decoder, len(sequences))
        try:
            return self._steady.step(sequences, token_ids)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free graphs, buffers and threads; the next step makes new ones."""
        self._steady = self._last_layout = None
        if self._micro_batches is not None:
            self._micro_batches.close()
        self._micro_batches = None

    def _micro_batches_for(self, sequences: abc.Sequence[Sequence]) -> MicroBatches:
        from nearfar.runtime.steps.gpu.micro_batches import (  # needs Triton, which a CPU lacks
            MicroBatches,
            MicroBatchesKey,
        )

        batch = len(sequences)
        far = sequences[0].policy.traits.keeps_far
        needed = max(sequence.far.store.length(0) for sequence in sequences)
        old = self._micro_batches
        if old is not None and old.key.batch == batch and old.key.capacity_tokens >= needed:
            return old
        self.close()
        capacity = needed + ROOM_TOKENS if far else 0
        key = MicroBatchesKey(batch, far_micro_batches(batch) if far else 1, capacity)
        self._micro_batches = MicroBatches(self._decoder, key, sequences, self._threads)
        return self._micro_batches
