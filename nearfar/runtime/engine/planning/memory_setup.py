"""The setup for which memory is planned: a model, a policy, a device, and its near and far rows.

All sizes are for one sequence. A row is a token's keys and values in one layer, all KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from nearfar.config import Budget, EngineConfig
from nearfar.policies.base import Policy
from nearfar.runtime.memory.far_state import SPILL_TOKENS
from nearfar.runtime.memory.far_store import BLOCK_TOKENS
from nearfar.runtime.memory.near_store import growth_tokens
from nearfar.runtime.memory.sequence_settings import budget_of, near_limit
from nearfar.runtime.models.plan import ModelPlan
from nearfar.storage import FORMATS, check_head_dim, group_tokens, token_bytes

CPU = torch.device("cpu")
POSITION_BYTES, SCORE_BYTES = 8, 4  # of a near row and KV head


@dataclass(frozen=True)
class MemorySetup:
    """Raises InvalidOptionError for a policy, format or budget that cannot serve the model."""

    model: ModelPlan
    config: EngineConfig
    policy: Policy
    dtype: torch.dtype  # of weights, activations and near rows
    device: torch.device = CPU  # of near memory

    def __post_init__(self) -> None:
        self.policy.check_model(self.model.geometry)
        check_head_dim(self.far_dtype, self.model.geometry.head_dim)
        _ = self.budget  # raises where it is too small

    @cached_property
    def budget(self) -> Budget:
        """The budget in keys: the one place that resolves it for an engine."""
        geometry, traits = self.model.geometry, self.policy.traits
        return budget_of(self.config, geometry, traits, self.dtype.itemsize)

    @property
    def on_gpu(self) -> bool:
        """Whether near memory is a GPU's."""
        return self.device.type == "cuda"

    @property
    def evicts(self) -> bool:
        """Whether the policy drops near rows for ever."""
        return self.policy.traits.kind == "evicts"

    @property
    def far_dtype(self) -> torch.dtype:
        """The type of stored far rows."""
        return FORMATS[self.config.far_dtype]

    @property
    def near_index(self) -> bool:
        """Whether the policy's index is on the GPU."""
        return self.on_gpu and self.policy.selects_near

    @property
    def row_bytes(self) -> int:
        """Bytes of a near row."""
        geometry = self.model.geometry
        return geometry.kv_heads * 2 * geometry.head_dim * self.dtype.itemsize

    @property
    def note_bytes(self) -> int:
        """Bytes stored with a near row: its position in the text, and a score."""
        if not self.evicts:
            return 0
        scored = SCORE_BYTES if self.policy.traits.needs_attention else 0
        return self.model.geometry.kv_heads * (POSITION_BYTES + scored)

    def near_tokens(self, context_tokens: int) -> int:
        """The largest number of near rows of a layer."""
        kept = self.config.sinks + self.config.window
        if self.policy.traits.keeps_far:
            return min(context_tokens, kept + SPILL_TOKENS)
        if not self.evicts:
            return context_tokens
        return min(context_tokens, near_limit(self.budget, kept, context_tokens))

    def far_tokens(self, context_tokens: int) -> int:
        """The number of far rows of a layer."""
        if not self.policy.traits.keeps_far:
            return 0
        rest = max(0, context_tokens - self.config.sinks - self.config.window)
        return rest - rest % group_tokens(self.far_dtype)

    def far_bytes(self, context_tokens: int) -> int:
        """Bytes of far rows, all layers, in whole blocks."""
        geometry = self.model.geometry
        blocks = -(-self.far_tokens(context_tokens) // BLOCK_TOKENS)
        token = geometry.kv_heads * token_bytes(self.far_dtype, geometry.head_dim)
        return geometry.layers * blocks * BLOCK_TOKENS * token

    def mark_bytes(self, context_tokens: int) -> int:
        """Bytes of the copy of near rows, all layers, that a document keeps as its mark."""
        if not (self.evicts or self.policy.traits.keeps_far):
            return 0  # rows only grow: their number is enough
        near = self.near_tokens(context_tokens)
        return self.model.geometry.layers * near * (self.row_bytes + self.note_bytes)

    def growth_bytes(self, context_tokens: int) -> int:
        """Bytes of spare near rows after ``context_tokens``, and of one layer's copy to them."""
        if self.policy.traits.keeps_far:
            return 0
        near = self.near_tokens(context_tokens)
        rows = self.model.geometry.layers * growth_tokens(near) + near
        return rows * (self.row_bytes + self.note_bytes)

    def index_growth_bytes(self, context_tokens: int) -> int:
        """The same for an index on the host.

        An index on a GPU has room for a question and its answer from the start.
        """
        if self.near_index:
            return 0
        geometry, keys = self.model.geometry, self.far_tokens(context_tokens)
        predict = self.policy.predict_index_bytes
        held, later = predict(geometry, keys), predict(geometry, keys + growth_tokens(keys))
        return later - held + held // geometry.layers
