"""AdaKV: one budget for all heads of a layer, spent where weights are largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.errors import InvalidOptionError
from nearfar.policies.base import NearState, Policy, PromptQueryStats, Traits
from nearfar.policies.evicting import DropsLightest
from nearfar.policies.registry import create_policy
from nearfar.records import Geometry


@dataclass(frozen=True)
class AdaKV(DropsLightest):
    """Wraps another policy's weights: the heaviest tokens of all heads of a layer stay.

    Each KV head keeps sinks, window and a share `floor` of the budget. The rest of the Hkv budgets
    goes to the heaviest tokens of the layer in any head. Heads keep different numbers of tokens and
    hold memory only for these.
    """

    score: str = "snapkv"  # an evicting policy; its parameters follow with +: snapkv+queries=16
    floor: float = 0.2  # of the budget, for every head

    name = "adakv"
    traits = Traits(
        kind="evicts",
        summary="one budget for all heads of a layer, by another policy's scores",
        source="Feng et al., Ada-KV, arXiv 2407.11550",
        keeps_far=False,
        evicts_once=True,
        watches="last",
        ragged=True,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise InvalidOptionError(f"adakv's floor must be between 0 and 1. Got {self.floor!r}.")
        self.set_traits(watches=self.inner.traits.watches)

    @property
    def inner(self) -> DropsLightest:
        """The policy whose weights count."""
        name = self.score.partition("+")[0]
        inner = None if name == self.name else create_policy(self.score.replace("+", ":"))
        if not isinstance(inner, DropsLightest):
            raise InvalidOptionError(
                f"adakv's score must be a policy that drops the lightest tokens, like snapkv or "
                f"expected-attention. Got {self.score!r}."
            )
        if type(inner).new_evicted_summary is not Policy.new_evicted_summary:
            raise InvalidOptionError(
                f"adakv keeps nothing of dropped tokens, which {inner.name} does. Give the score "
                f"of what it drops them by, like h2o. Got {self.score!r}."
            )
        return inner

    def contents(self) -> dict[str, str]:
        """Those of the wrapped policy."""
        return {f"score.{name}": content for name, content in self.inner.contents().items()}

    def layer_budget(self, budget: int, layer: int, layers: int) -> int:
        """That of the wrapped policy."""
        return self.inner.layer_budget(budget, layer, layers)

    def score_prompt(self, near: NearState, stats: PromptQueryStats) -> torch.Tensor:
        """That of the wrapped policy."""
        return self.inner.score_prompt(near, stats)

    def weights(self, near: NearState) -> torch.Tensor:
        """Those of the wrapped policy."""
        return self.inner.weights(near)

    def weighing_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Those of the wrapped policy."""
        return self.inner.weighing_bytes(geometry, tokens, dtype)

    def kept(self, near: NearState) -> torch.Tensor:
        """Sinks and window, the heaviest of each head, then the heaviest of all."""
        spared = self.spared(near)
        weights = self.weights(near).float()
        Hkv, C = weights.shape
        total = Hkv * near.limit
        own = int(self.floor * (near.limit - near.sinks - near.window))
        stays = spared.clone()
        if own:
            best = weights.masked_fill(spared, -torch.inf).topk(min(own, C), dim=-1).indices
            stays.scatter_(1, best, True)
        rest = total - int(stays.sum())
        if rest > 0:
            free = weights.masked_fill(stays, -torch.inf).flatten()
            stays.view(-1)[free.topk(min(rest, len(free))).indices] = True
        return stays
