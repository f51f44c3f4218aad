"""Clusters: the nearest clusters of keys are read, all others are estimated from their centroids.

    steady      sinks and window, near, as under every policy
    retrieved   clusters of largest q . centroid, read key by key
    estimated   each other cluster as one key, its centroid, that counts for all of them, and one
                value, their mean

Far keys are clustered in segments of consecutive ones, so that a segment, once made, never changes.
Keys behind the last full segment are always read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.lsh.clustering import cluster_by_angle
from nearfar.policies.base import Policy, Traits
from nearfar.policies.growing import (
    PIECE_KEYS,
    SELECTING_BYTES,
    GrowingBlocks,
    GrowingIndex,
)
from nearfar.policies.index import FarIndex, Form
from nearfar.records import ALL, AllOrNone, FarView, Geometry, Partial, Selection
from nearfar.storage import decoding_bytes

SEGMENT_KEYS = 256
LAYOUT = 1  # of the arrays, and of how clusters are made


@dataclass(frozen=True)
class Clusters(Policy):
    """A cluster index with an estimation zone.

    exp(q . centroid) times the number of keys is a lower bound of a cluster's softmax mass
    (Jensen), and close to it if its keys are similar.
    """

    keys: int = 16  # of a cluster, in the mean
    estimated: float = 1.0  # share of the clusters not read that is estimated, the best first

    name = "clusters"
    traits = Traits(
        kind="selects",
        summary="clusters of far keys: the nearest are read, others estimated by their centroids",
        source="Chen et al., RetroInfer, arXiv 2505.02922",
        keeps_far=True,
    )

    def __post_init__(self) -> None:
        if self.keys < 1 or SEGMENT_KEYS % self.keys:
            raise InvalidOptionError(
                f"clusters' keys must divide {SEGMENT_KEYS}, like 8, 16 or 32. Got {self.keys!r}."
            )
        if not 0 <= self.estimated <= 1:
            raise InvalidOptionError(
                f"clusters' estimated must be between 0 and 1. Got {self.estimated!r}."
            )

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> FarIndex:
        """Clusters of every layer."""
        return ClusterIndex(self, geometry, budget)

    def predict_index_bytes(self, geometry: Geometry, num_keys: int) -> int:
        """Two float32 vectors and two numbers a cluster, one number a key."""
        clusters = SEGMENT_KEYS // self.keys
        segment = 4 * (clusters * (2 * geometry.head_dim + 1) + SEGMENT_KEYS)
        return geometry.layers * geometry.kv_heads * (num_keys // SEGMENT_KEYS) * segment

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """A piece of keys and values in float32 and their clusters; then scores of clusters."""
        heads, dim = geometry.kv_heads, geometry.head_dim
        key = 16 * dim + 16 * (SEGMENT_KEYS // self.keys) + 16
        piece = min(tokens, PIECE_KEYS) * max(key, 4 * dim + decoding_bytes(dtype, dim))
        return heads * max(piece, tokens * (geometry.group + 10)) + SELECTING_BYTES


class ClusterIndex(GrowingIndex):
    """Clusters of one sequence."""

    def __init__(self, policy: Clusters, geometry: Geometry, budget: Budget) -> None:
        self._policy, self._budget = policy, budget
        self._per_segment = C = SEGMENT_KEYS // policy.keys
        shapes = {
            "centroids": (torch.float32, (C, geometry.head_dim)),
            "values": (torch.float32, (C, geometry.head_dim)),  # means
            "sizes": (torch.int32, (C,)),
            "members": (torch.int32, (SEGMENT_KEYS,)),  # keys of the segment, cluster by cluster
        }
        super().__init__(geometry, SEGMENT_KEYS, shapes)

    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        """Cluster the segments that are full now."""
        for span in self.new_spans(layer, far.length):
            self._layers[layer].append(self._clustered(far, span))

    def _clustered(self, far: FarView, span: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The clusters of the segments in ``span``."""
        D, C = self._geometry.head_dim, self._per_segment
        keys = far.keys(*span).float().reshape(self._geometry.kv_heads, -1, SEGMENT_KEYS, D)
        values = far.values(*span).float().reshape(keys.shape)
        numbers = cluster_by_angle(keys, C)
        member = torch.nn.functional.one_hot(numbers, C).float().transpose(-1, -2)
        sizes = member.sum(-1)
        share = member / sizes.clamp(min=1)[..., None]
        return {
            "centroids": share @ keys,
            "values": share @ values,
            "sizes": sizes.int(),
            "members": numbers.argsort(dim=-1, stable=True).int(),
        }

    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        """The nearest clusters that the budget allows, at least one, and the last keys."""
        budget = self._budget.keys(far.length)
        if budget == far.length:
            return ALL
        blocks = self._layers[layer]
        Hkv, D = self._geometry.kv_heads, self._geometry.head_dim
        sizes = blocks["sizes"].reshape(Hkv, -1)
        centroids = blocks["centroids"].reshape(Hkv, -1, D)
        logits = query.view(Hkv, -1, D) @ centroids.transpose(1, 2)  # [Hkv, G, clusters]
        logits = logits.masked_fill(sizes[:, None] == 0, -torch.inf)
        pending = far.length - blocks.length * SEGMENT_KEYS
        read = _nearest(logits, sizes, budget - pending)
        selection = self._members(blocks, read.numpy(), sizes.numpy(), far.length)
        if blocks.length == 0 or self._policy.estimated == 0:
            return selection
        estimate = self._estimate(blocks, logits, sizes, read)
        return Selection(
            selection.indices,
            selection.offsets,
            selection.log_weights,
            selection.heads_per_row,
            estimate,
        )

    def _members(
        self, blocks: GrowingBlocks, read: NDArray[np.bool_], sizes: NDArray[np.int32], length: int
    ) -> Selection:
        """The keys of clusters that are ``read`` [Hkv, clusters], and those in no segment yet."""
        Hkv, G = self._geometry.kv_heads, self._geometry.group
        first = np.arange(blocks.length, dtype=np.int32)[:, None] * SEGMENT_KEYS
        members = (blocks["members"].numpy() + first).reshape(Hkv, -1)
        rest = np.arange(blocks.length * SEGMENT_KEYS, length, dtype=np.int32)
        rows = []
        for head in range(Hkv):
            # members are stored by cluster: repeat marks each member whose cluster is read
            chosen = members[head][np.repeat(read[head], sizes[head])]
            rows += [np.sort(chosen), rest]
        counts = [len(rows[i]) + len(rest) for i in range(0, 2 * Hkv, 2)]
        indices = np.concatenate(rows)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return Selection(indices, offsets, np.zeros(len(indices), np.float32), G)

    def _estimate(
        self, blocks: GrowingBlocks, logits: torch.Tensor, sizes: torch.Tensor, read: torch.Tensor
    ) -> Partial:
        """Attention over clusters that are not read, each as its centroid and its mean value."""
        Hkv, G, C = logits.shape
        left = (logits + sizes.float().log()[:, None]).masked_fill(read[:, None], -torch.inf)
        if self._policy.estimated < 1:
            count = int(self._policy.estimated * C)
            best = left.topk(count, dim=-1).indices
            left = torch.full_like(left, -torch.inf).scatter_(-1, best, left.gather(-1, best))
        lse = left.logsumexp(-1)
        # of nothing the sum is 0, not 0 / 0
        weights = torch.exp(left - lse.nan_to_num(neginf=0.0)[..., None])
        out = weights @ blocks["values"].reshape(Hkv, C, -1)
        return Partial(out.reshape(Hkv * G, -1), lse.reshape(-1))

    def form(self) -> Form:
        """The parameters of clusters."""
        return {"index": "clusters", "keys": self._policy.keys, "layout": LAYOUT}

    def restore(self, arrays: Mapping[str, NDArray[Any]], num_keys: int) -> None:
        """Checks every member and size: the selection follows them without checks."""
        super().restore(arrays, num_keys)
        for layer in self._layers:
            members, sizes = layer["members"], layer["sizes"]
            whole = torch.arange(SEGMENT_KEYS, dtype=torch.int32)
            if not (members.sort(-1).values == whole).all():
                raise ValueError("clusters do not have each key once")
            if (sizes < 0).any() or (sizes.sum(-1) != SEGMENT_KEYS).any():
                raise ValueError("sizes of clusters are not those of their keys")


def _nearest(logits: torch.Tensor, sizes: torch.Tensor, budget: int) -> torch.Tensor:
    """A mask [Hkv, clusters] of the best by mean softmax of ``logits``, of ``budget`` keys a row.

    At least one cluster, however many keys it has.
    """
    order = logits.softmax(-1).mean(1).argsort(-1, descending=True)
    reached = sizes.gather(1, order).cumsum(-1)
    chosen = reached <= budget
    chosen[:, :1] = True
    return torch.zeros(sizes.shape, dtype=torch.bool).scatter_(1, order, chosen)
