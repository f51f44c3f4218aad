"""The sources of an answer: the passages of a document that its tokens attended to most.

After an answer is complete, its tokens pass the model again, with an `AttentionRecorder` in front
of the policy's index. In every layer it computes, for every selection, the share of attention that
each selected key gets. A randomly drawn key is weighted by its inverse probability, so sums over a
passage are unbiased. If the GPU selects, the host has no list of selected keys; all far keys are
then recorded.

Some places get attention from every token, independent of the question: first words, line ends. So
the score of a document token is its attention above its own median over the answer's tokens, as a
share of all attention. `best_passages` ranks sentences by this score.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.policies.index import FarIndex
from nearfar.records import AllOrNone, FarView, Selection
from nearfar.results import Passage
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.text.text_origins import UNNAMED, Text

MAX_STEPS = 256  # of an answer that are recorded
MAX_PASSAGE = 400  # characters
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*")  # between two passages


class AttentionRecorder:
    """Selects the same keys as a sequence's index, and records their attention."""

    def __init__(self, sequence: Sequence, tokens: int, first_step: int) -> None:
        assert sequence.far.index is not None
        self._index = sequence.far.index
        self._sequence = sequence
        self._tokens = tokens  # of the document, which are the sequence's first
        self._steps = range(first_step, first_step + MAX_STEPS)
        # for each step the attention of each document token, summed over all heads and layers
        self._noted: dict[int, NDArray[np.float32]] = {}

    @property
    def attention(self) -> NDArray[np.float32]:
        """The share of each step's attention [steps, tokens] that each document token got."""
        geometry = self._sequence.settings.geometry
        rows = np.stack([*self._noted.values()]) if self._noted else np.zeros((0, self._tokens))
        return (rows / (geometry.layers * geometry.query_heads)).astype(np.float32)

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        """The selection of the index, recorded from the first step on."""
        selection: Selection | AllOrNone = AllOrNone.ALL
        if isinstance(self._index, FarIndex):
            selection = self._index.select(layer, query, far, step)
        if step in self._steps and selection is not AllOrNone.NONE:
            noted = self._noted.setdefault(step, np.zeros(self._tokens, np.float32))
            self._note(layer, query, far, selection, noted)
        return selection

    def _note(
        self,
        layer: int,
        query: torch.Tensor,
        far: FarView,
        selection: Selection | AllOrNone,
        noted: NDArray[np.float32],
    ) -> None:
        near = self._sequence.near[layer]
        sinks = min(self._sequence.settings.sinks, near.length)
        Hkv, Hq = far.rows.shape[0], len(query)
        grouped = query.view(Hkv, -1, far.head_dim)
        near_logits = (grouped @ near.keys.cpu().float().transpose(1, 2)).view(Hq, -1)
        window = np.arange(sinks + far.length, far.length + near.length)
        near_tokens = np.concatenate([np.arange(sinks), window])
        for heads, indices, log_weights in _rows(selection, far, Hq):
            keys, _ = far.gather(heads.start * Hkv // Hq, indices)
            logits = torch.cat([near_logits[heads], query[heads] @ keys.T + log_weights], 1)
            shares = logits.softmax(1).sum(0).numpy()
            tokens = np.concatenate([near_tokens, sinks + indices.numpy()])
            ours = tokens < len(noted)
            np.add.at(noted, tokens[ours], shares[ours])


def _rows(
    selection: Selection | AllOrNone, far: FarView, Hq: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Query heads, far keys and log-weights of each row of a selection."""
    if not isinstance(selection, Selection):
        everything = torch.arange(far.length)
        group = Hq // far.rows.shape[0]
        for first in range(0, Hq, group):
            yield slice(first, first + group), everything, torch.zeros(far.length)
        return
    size = selection.heads_per_row
    for row, (start, stop) in enumerate(itertools.pairwise(selection.offsets)):
        indices = torch.from_numpy(selection.indices[start:stop]).long()
        weights = torch.from_numpy(selection.log_weights[start:stop])
        yield slice(row * size, (row + 1) * size), indices, weights


def best_passages(
    text: Text, spans: NDArray[np.int32], attention: NDArray[np.float32], count: int
) -> tuple[Passage, ...]:
    """The ``count`` sentences of ``text`` that stand out most in ``attention`` [steps, tokens].

    ``spans`` [tokens, 2] are the tokens' character ranges. The weight of a passage is the attention
    of its tokens above their medians, as a share of all attention of the steps.
    """
    if not len(attention):
        return ()
    usual = np.median(attention, axis=0) if len(attention) > 1 else 0
    weights = np.maximum(attention - usual, 0).mean(0) * (spans[:, 1] > spans[:, 0])
    starts = np.array(_passage_starts(text))
    stops = np.append(starts[1:], len(text))
    owner = np.searchsorted(starts, spans[:, 0], side="right") - 1
    sums = np.bincount(owner, weights, len(starts))
    best = sums.argsort()[::-1][:count]
    found = [(int(starts[i]), int(stops[i]), float(sums[i])) for i in best if sums[i] > 0]
    return tuple(_passage(text, *each) for each in found)


def _passage_starts(text: str) -> list[int]:
    """The starts of sentences and lines; long ones are cut, at a blank if possible."""
    starts = [0]
    for end in [*(match.end() for match in _SENTENCE.finditer(text)), len(text)]:
        while end - starts[-1] > MAX_PASSAGE:
            limit = starts[-1] + MAX_PASSAGE
            blank = text.rfind(" ", starts[-1], limit)
            starts.append(limit if blank < 0 else blank + 1)
        if end < len(text):
            starts.append(end)
    return starts


def _passage(text: Text, start: int, stop: int, weight: float) -> Passage:
    """A passage with its place in its own file; text that belongs to no file is named `text`."""
    words = text[start:stop]
    start += len(words) - len(words.lstrip())
    stop = start + len(words.strip())
    source = text.source_at(start)
    if source is None:
        return Passage(UNNAMED, start, stop, text[start:stop], weight)
    stop = min(stop, source.stop)
    first, last = source.original(start), source.original(stop - 1) + 1
    return Passage(source.name, first, last, text[start:stop], weight)
