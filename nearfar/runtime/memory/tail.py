"""What a sequence took in after a mark, kept apart so that it can be taken in again.

A mark is a point to return to, and returning forgets. A tail remembers: after any number of other
readings the sequence is brought back to where it was. It costs the rows after the mark and a copy
of the near set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nearfar.runtime.memory.mark import Mark
from nearfar.runtime.memory.near_store import NearLayer
from nearfar.runtime.memory.sequence import Sequence


@dataclass(frozen=True)
class Tail:
    """The state of a sequence beyond a mark."""

    tokens: int  # read in all
    far: list[torch.Tensor]  # of each layer the far rows [Hkv, n, 2 D] after the mark, as stored
    near: list[NearLayer]  # of each layer the near set, or what it has after the mark if it grows
    remnant: Any = None  # of what an evicting policy dropped, before the mark and after it


def tail_since(sequence: Sequence, mark: Mark) -> Tail:
    """What ``sequence`` took in since ``mark``, copied."""
    far = []
    for layer, start in enumerate(mark.far):
        view = sequence.far.view(layer)
        far.append(view.rows[:, start : view.length].clone())
    near = []
    for own, saved in zip(sequence.near, mark.near, strict=True):
        if isinstance(saved, int):
            rows = own.rows[:, saved : own.length].clone()
            near.append(NearLayer(rows, rows.shape[1]))
        else:
            near.append(own.snapshot())
    remnant = None if sequence.remnant is None else sequence.remnant.mark()
    return Tail(sequence.tokens, far, near, remnant)


def put_back(sequence: Sequence, mark: Mark, tail: Tail) -> None:
    """Return to ``mark`` and take in ``tail`` again."""
    sequence.rewind(mark)
    for i, layer in enumerate(sequence.near):
        if tail.far[i].shape[1]:
            sequence.far.append_stored(i, tail.far[i])
            if sequence.index is not None:
                sequence.index.extend(i, sequence.far.view(i))
        saved = tail.near[i]
        if isinstance(mark.near[i], int):
            layer.extend(saved.keys, saved.values, layer.length)
        else:
            layer.restore(saved)
    if sequence.remnant is not None:
        sequence.remnant.restore(tail.remnant)
    sequence.tokens = tail.tokens
