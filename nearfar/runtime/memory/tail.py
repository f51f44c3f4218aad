"""What a sequence took in after a mark, kept apart so that it can be taken in again.

A mark is a point to return to, and returning forgets. A tail remembers: after any number of other
readings the sequence is brought back to where it was. It costs the rows after the mark and a copy
of the near set.
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

    tokens: int  # read in all
    far: list[torch.Tensor]  # of each layer the far rows [Hkv, n, 2 D] after the mark, as stored
    near: list[NearLayer]  # of each layer the near set, or what it has after the mark if it grows
    evicted_summary: Any = None  # of what an evicting policy dropped, before the mark and after it


def delta_since(sequence: Sequence, mark: Mark) -> SequenceDelta:
    """What ``sequence`` took in since ``mark``, copied."""
    far = []
    for layer, start in enumerate(mark.far.lengths):
        view = sequence.far.store.view(layer)
        far.append(view.rows[:, start : view.length].clone())
    states = zip(sequence.layers, mark.layers, strict=True)
    near = [layer.since(saved) for layer, saved in states]
    evicted_summary = None if sequence.evicted_summary is None else sequence.evicted_summary.mark()
    return SequenceDelta(sequence.tokens, far, near, evicted_summary)


def put_back(sequence: Sequence, mark: Mark, tail: SequenceDelta) -> None:
    """Return to ``mark`` and take in ``tail`` again."""
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
