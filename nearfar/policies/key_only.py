"""Policies that look at keys alone, or at nothing. What costs more must do better."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  its usual name

from nearfar.config import generator_seed
from nearfar.policies.base import NearState, Traits
from nearfar.policies.evicting import DropsLightest
from nearfar.records import Geometry

_KEY_ONLY = Traits(kind="evicts", summary="", source="", keeps_far=False, evicts_once=True)


@dataclass(frozen=True)
class KeyOnly(DropsLightest):
    """A policy whose weights follow from keys, so that it can act at any time."""

    once: bool = True  # after the prompt; False: bounded through decode

    def __post_init__(self) -> None:
        self.set_traits(evicts_once=self.once)


@dataclass(frozen=True)
class Knorm(KeyOnly):
    """Keeps the keys of smallest norm, which get most attention."""

    name = "knorm"
    traits = dataclasses.replace(
        _KEY_ONLY,
        summary="the keys of smallest norm",
        source="Devoto et al., arXiv 2406.11430",
    )

    def weights(self, near: NearState) -> torch.Tensor:
        """-|k|."""
        squares: torch.Tensor = near.keys.float().square().sum(-1)
        return -squares

    def weighing_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Keys in float32, and their squares."""
        return geometry.kv_heads * tokens * 8 * geometry.head_dim


@dataclass(frozen=True)
class KeyDiff(KeyOnly):
    """Keeps the keys that are least similar to the mean key."""

    name = "keydiff"
    traits = dataclasses.replace(
        _KEY_ONLY,
        summary="the keys least similar to their mean",
        source="Park et al., KeyDiff, arXiv 2504.15364",
    )

    def weights(self, near: NearState) -> torch.Tensor:
        """-cos(k, mean of k / |k|)."""
        keys = F.normalize(near.keys.float(), dim=-1)
        return -F.cosine_similarity(keys, keys.mean(1, keepdim=True), dim=-1)

    def weighing_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Keys in float32, their directions, and products with the mean one."""
        return geometry.kv_heads * tokens * 16 * geometry.head_dim


@dataclass(frozen=True)
class Random(KeyOnly):
    """Keeps a uniform sample of the tokens, another one in each layer and head."""

    seed: int = 0

    name = "random"
    traits = dataclasses.replace(
        _KEY_ONLY, summary="tokens at random", source="a uniform sample; the baseline of all others"
    )

    def weights(self, near: NearState) -> torch.Tensor:
        """A number that layer, head and position give a token for ever.

        So what is left of a growing text is always a uniform sample of it (as by reservoir
        sampling), and does not depend on when tokens went.
        """
        heads = torch.arange(len(near.positions), device=near.positions.device)[:, None]
        x = _mixed(
            torch.full_like(heads, generator_seed(self.seed)) + _mixed(heads + (near.layer << 16))
        )
        return (_mixed(x + near.positions) >> 8).float()


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """32 bits that look independent of those of ``x`` int64 (the finaliser of MurmurHash3)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
