"""Contexts in memory, read once for all policies that share a reading.

One reading is held at a time, beside the sequence of one policy. If a reading does not fit host
memory, or only one policy needs it, the policy reads for itself: the result is the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from nearfar.errors import OutOfMemoryError
from nearfar.progress import silent
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.shared_prefill import SharedPrefill, prefill_once
from nearfar.runtime.memory.sequence import Sequence


@dataclass(frozen=True)
class Taken:
    """A sequence that has a context, and its cost."""

    sequence: Sequence
    read_seconds: float
    take_in_seconds: float
    shared: bool


class SharedContext:
    """A context that sequences of several policies share."""

    def __init__(self, engine: Engine, ids: list[int], *, with_attention: bool, shared: bool):
        self._engine, self._ids = engine, ids
        self._with_attention = with_attention
        self._shared = shared and bool(ids)
        self._reading: SharedPrefill | None = None

    @property
    def tokens(self) -> int:
        """Of the context."""
        return len(self._ids)

    def take(self, engine: Engine, *, observed: bool = False) -> Taken:
        """A new sequence under the policy of ``engine`` that has the context.

        ``observed`` as for `Engine.new_sequence`. Raises OutOfMemoryError where that does not fit.
        """
        engine.check_memory(max(1, len(self._ids)))
        reading = self._read()
        sequence = engine.new_sequence(observed=observed)
        if reading is None:
            return Taken(sequence, engine.read_ids(sequence, self._ids, silent), 0.0, False)
        started = time.perf_counter()
        reading.give_to(sequence)
        return Taken(sequence, reading.seconds, time.perf_counter() - started, True)

    def close(self) -> None:
        """Give the memory back."""
        if self._reading is not None:
            self._reading.close()
        self._reading = None

    def _read(self) -> SharedPrefill | None:
        if self._shared and self._reading is None:
            try:
                self._reading = prefill_once(
                    self._engine, self._ids, with_attention=self._with_attention
                )
            except OutOfMemoryError:
                self._shared = False
        return self._reading
