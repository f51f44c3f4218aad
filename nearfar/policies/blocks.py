"""Common parts of policies that read whole blocks of consecutive far keys, by a summary of each.

A summary is made once a block is full. Keys behind the last full block, fewer than a block, are
always read; they are the most recent far ones.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.policies.base import Policy, check_per
from nearfar.policies.growing import PIECE_KEYS, SELECTING_BYTES, GrowingIndex
from nearfar.policies.index import FarIndex, Form
from nearfar.records import ALL, AllOrNone, FarView, Geometry, Selection
from nearfar.storage import decoding_bytes


@dataclass(frozen=True)
class ReadsBlocks(Policy):
    """Scores blocks of ``size`` keys by vectors of each, and reads the best blocks.

    A block's score for a query head is the mean of the dot products of the head's `features` with
    the vectors of the block's `summary`. A KV group reads the blocks of largest softmax over
    scores, in the mean over its heads.
    """

    size: int = 16  # keys of a block
    per: str = "group"  # group: one set for a KV group; head: budget / G keys for each query head

    def __post_init__(self) -> None:
        check_per(self.name, self.per)
        if self.size < 1:
            raise InvalidOptionError(f"{self.name}'s size must be 1 or more. Got {self.size!r}.")

    @abstractmethod
    def summary_shape(self, head_dim: int) -> tuple[int, int]:
        """Vectors of a block and their length."""

    @abstractmethod
    def summary(self, keys: torch.Tensor) -> torch.Tensor:
        """Vectors [Hkv, n, R, W] float32 of ``keys`` [Hkv, n, size, D] float32."""

    @abstractmethod
    def features(self, query: torch.Tensor) -> torch.Tensor:
        """The factors [..., W] of summaries for ``query`` [..., D]."""

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> FarIndex:
        """Summaries of every layer."""
        return BlockIndex(self, geometry, budget)

    def predict_index_bytes(self, geometry: Geometry, num_keys: int) -> int:
        """Float32 summaries of full blocks."""
        numbers = int(np.prod(self.summary_shape(geometry.head_dim)))
        return geometry.layers * geometry.kv_heads * (num_keys // self.size) * numbers * 4

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """A piece of keys in float32 and what its summaries are made of; then scores of blocks."""
        heads, dim = geometry.kv_heads, geometry.head_dim
        piece = min(tokens, PIECE_KEYS + self.size) * (12 * dim + decoding_bytes(dtype, dim))
        return heads * max(piece, tokens * (geometry.group + 4)) + SELECTING_BYTES


class BlockIndex(GrowingIndex):
    """Summaries of one sequence.

    They only rank blocks: any numbers from a file select blocks that exist.
    """

    def __init__(self, policy: ReadsBlocks, geometry: Geometry, budget: Budget) -> None:
        self._policy, self._budget = policy, budget
        summary = (torch.float32, policy.summary_shape(geometry.head_dim))
        super().__init__(geometry, policy.size, {"summary": summary})

    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        """Summarise the blocks that are full now."""
        blocks = self._layers[layer]
        for span in self.new_spans(layer, far.length):
            blocks.append({"summary": self._summary(far, span)})

    def _summary(self, far: FarView, span: tuple[int, int]) -> torch.Tensor:
        """Summaries of the blocks in ``span``."""
        keys = far.keys(*span).float()
        return self._policy.summary(keys.reshape(len(keys), -1, self._policy.size, keys.shape[2]))

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        """The best blocks, as many as the budget allows but at least one, and the last keys."""
        budget = self._budget.keys(far.length)
        if budget == far.length:
            return ALL
        weights = self._weights(layer, query)
        rows, blocks = weights.shape
        heads_per_row = len(query) // rows
        if self._policy.per == "head":
            budget = max(1, budget // self._geometry.group)
        size = self._policy.size
        rest = np.arange(blocks * size, far.length, dtype=np.int32)
        count = min(blocks, max(1, (budget - len(rest)) // size))
        best = weights.topk(count, dim=-1, sorted=False).indices.sort(-1).values.numpy()
        inside = np.arange(size, dtype=np.int32)
        keys = (best[..., None].astype(np.int32) * size + inside).reshape(rows, -1)
        indices = np.concatenate([keys, np.tile(rest, (rows, 1))], 1)
        offsets = np.arange(rows + 1, dtype=np.int64) * indices.shape[1]
        return Selection(
            indices.ravel(), offsets, np.zeros(indices.size, np.float32), heads_per_row
        )

    def _weights(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """The ranks of blocks, [rows, blocks]."""
        summary = self._layers[layer]["summary"]
        Hkv, blocks, vectors, width = summary.shape
        features = self._policy.features(query.view(Hkv, -1, query.shape[1]))
        scores = features @ summary.reshape(Hkv, -1, width).transpose(1, 2)
        scores = scores.view(Hkv, len(query) // Hkv, blocks, vectors).mean(-1)
        if self._policy.per == "head":
            return scores.flatten(0, 1)
        return scores.softmax(-1).mean(1)

    def form(self) -> Form:
        """The policy's name and the parameters of its summaries."""
        vectors, width = self._policy.summary_shape(self._geometry.head_dim)
        return {
            "index": self._policy.name,
            "size": self._policy.size,
            "vectors": vectors,
            "width": width,
        }
