"""A copy of the tokens that a sequence read after a mark, so that it can be restored.

A return to a mark drops all later tokens. A tail keeps them: after any number of other readings it
restores the sequence. It takes the memory of the rows after the mark and of a copy of the near set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nearfar.runtime.memory.near_store import NearLayer
from nearfar.runtime.memory.sequence import Mark, Sequence


@dataclass(frozen=True)
class SequenceDelta:
    """The state of a sequence beyond a mark."""

    tokens: int  # in all
    far: list[torch.Tensor]  # of each layer the far rows [Hkv, n, 2 D] after the mark, as stored
    near: list[NearLayer]  # of each layer the near set, or its rows after the mark if it grows
    evicted_summary: Any = None  # of the rows that an evicting policy dropped, before and after it


def delta_since(sequence: Sequence, mark: Mark) -> SequenceDelta:
    """A copy of the tokens that ``sequence`` read since ``mark``."""
    far = []
    for layer, start in enumerate(mark.far.lengths):
        view = sequence.far.store.view(layer)
        far.append(view.rows[:, start : view.length].clone())
    states = zip(sequence.layers, mark.layers, strict=True)
    near = [layer.since(saved) for layer, saved in states]
    evicted_summary = None if sequence.evicted_summary is None else sequence.evicted_summary.mark()
    return SequenceDelta(sequence.tokens, far, near, evicted_summary)


def put_back(sequence: Sequence, mark: Mark, tail: SequenceDelta) -> None:
    """Return to ``mark`` and add ``tail`` again."""
    sequence.rewind(mark)
    store, index = sequence.far.store, sequence.far.index
    for number, layer in enumerate(sequence.layers):
        if tail.far[number].shape[1]:
            store.append_stored(number, tail.far[number])
            if index is not None:
                index.extend(number, store.view(number))
        layer.put_back(tail.near[number])
    if sequence.evicted_summary is not None:
        sequence.evicted_summary.restore(tail.evicted_summary)
    sequence.tokens = tail.tokens
