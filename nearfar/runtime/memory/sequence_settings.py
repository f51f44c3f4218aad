"""The settings that all sequences of an engine share, and the number of near rows they imply."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.config import Budget, EngineConfig, generator_seed
from nearfar.policies.base import Policy, Traits
from nearfar.records import Geometry
from nearfar.runtime.models.decoder import Decoder
from nearfar.storage import FORMATS, token_bytes


@dataclass(frozen=True)
class SequenceSettings:
    """The settings that all sequences of an engine share."""

    geometry: Geometry
    policy: Policy
    budget: Budget
    sinks: int
    window: int
    far_dtype: torch.dtype
    capacity_tokens: int  # longest context
    seed: int
    near_dtype: torch.dtype
    device: torch.device  # of near memory
    near_selection: bool = False  # whether a policy that can keep its index on the GPU does so

    @property
    def counts_cache_slots(self) -> bool:
        """Whether positions are slots of the near set; its keys are then stored unrotated."""
        return self.policy.traits.positions == "cache-index"

    @property
    def reads_everything(self) -> bool:
        """Whether every step reads all far keys, so that nothing is selected."""
        return self.policy.traits.kind == "exact" and self.policy.traits.keeps_far

    @property
    def spared(self) -> int:
        """Near rows in addition to the budget: sinks and window."""
        return self.sinks + self.window

    def near_limit(self, first_tokens: int) -> int:
        """Mean near rows of a layer after a first prompt of ``first_tokens`` tokens."""
        return near_limit(self.budget, self.spared, first_tokens)

    def layer_limit(self, near_limit: int, layer: int) -> int:
        """Near rows of one layer."""
        budget = near_limit - self.spared
        return self.spared + self.policy.layer_budget(budget, layer, self.geometry.layers)


def near_limit(budget: Budget, spared: int, first_tokens: int) -> int:
    """Near rows that an evicting policy keeps in a layer: its budget and ``spared`` rows.

    A budget that is a share is a share of the ``first_tokens`` of the first prompt. A budget in
    keys may exceed a short prompt and then leaves room for later tokens.
    """
    keys = int(budget.value) if budget.value >= 1 else budget.keys(first_tokens)
    return spared + keys


def budget_of(config: EngineConfig, geometry: Geometry, traits: Traits, near_item: int) -> Budget:
    """The budget in far keys, or in near keys of ``near_item`` bytes if the policy evicts."""
    evicts = traits.kind == "evicts"
    far_bytes = token_bytes(FORMATS[config.far_dtype], geometry.head_dim)
    head_bytes = 2 * geometry.head_dim * near_item if evicts else far_bytes
    return Budget.of(config.budget, geometry.layers * geometry.kv_heads * head_bytes)


def settings_of(
    decoder: Decoder, config: EngineConfig, policy: Policy, budget: Budget
) -> SequenceSettings:
    """Settings of all sequences of a loaded model under a configuration."""
    geometry = decoder.plan.geometry
    return SequenceSettings(
        geometry,
        policy,
        budget,
        config.sinks,
        config.window,
        FORMATS[config.far_dtype],
        decoder.plan.max_context_tokens,
        generator_seed(config.seed),
        decoder.dtype,
        decoder.device,
    )
