"""Learned feature maps whose products stand for exp(q . k): the kernel of LESS.

    phi(q) = |gelu(gelu(q A) B)|                             a query head's
    u      = |s1| gelu(gelu(k A') B');  psi(k) = |u + (u C) s2|     a KV head's

Queries are scaled and rotated, keys rotated. A key's weight is phi . psi times exp(b), with a
number b for each query head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor

from nearfar.records import Geometry, Partial

HIDDEN, RANK = 128, 8
LEAST_MASS = 1e-20  # of phi . psi, whose logarithm is taken
FIRST_SCALE = 1e-4  # of untrained maps of keys: what was dropped weighs little


@dataclass(frozen=True)
class LayerMaps:
    """Maps of one layer."""

    q_in: Tensor  # [Hq, D, hidden]
    q_out: Tensor  # [Hq, hidden, rank]
    k_in: Tensor  # [Hkv, D, hidden]
    k_out: Tensor  # [Hkv, hidden, rank]
    k_mix: Tensor  # [Hkv, rank, rank]
    k_scale: Tensor  # [Hkv, rank]
    k_mix_scale: Tensor  # [Hkv, rank]
    log_scale: Tensor  # [Hq]

    def of_queries(self, queries: Tensor) -> Tensor:
        """Features [..., Hq, T, rank] of ``queries`` [..., Hq, T, D] float32."""
        return F.gelu(F.gelu(queries @ self.q_in) @ self.q_out).abs()

    def of_keys(self, keys: Tensor) -> Tensor:
        """Features [..., Hkv, N, rank] of ``keys`` [..., Hkv, N, D] float32."""
        u = F.gelu(F.gelu(keys @ self.k_in) @ self.k_out) * self.k_scale[:, None].abs()
        return (u + (u @ self.k_mix) * self.k_mix_scale[:, None]).abs()

    def sums(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of psi(k) v [Hkv, rank, D] and of psi(k) [Hkv, rank] over rows [Hkv, N, D]."""
        features = self.of_keys(keys)
        return features.mT @ values, features.sum(1)

    def attend(self, queries: Tensor, values: Tensor, masses: Tensor) -> Partial:
        """The result of ``queries`` [Hq, T, D] over such sums, ``values`` and ``masses``.

        phi . sum(psi v) / phi . sum(psi), and as log-sum-exp the logarithm of the latter plus b;
        -inf where nothing was summed.
        """
        group = len(queries) // len(masses)
        values, masses = (sums.repeat_interleave(group, 0) for sums in (values, masses))
        features = self.of_queries(queries)
        mass = (features @ masses[..., None])[..., 0].clamp_min(LEAST_MASS)
        lse = mass.log() + self.log_scale[:, None]
        empty = (masses == 0).all(-1)
        out = (features @ values) / mass[..., None]
        return Partial(out, lse.masked_fill(empty[:, None], -torch.inf))


NAMES = tuple(field.name for field in fields(LayerMaps))


def layer_maps(tensors: dict[str, Tensor], layer: int) -> LayerMaps:
    """The maps of one layer out of tensors [layers, ...] by name."""
    return LayerMaps(**{name: tensors[name][layer] for name in NAMES})


def map_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of all layers, by name."""
    L, Hq, Hkv, D = geometry.layers, geometry.query_heads, geometry.kv_heads, geometry.head_dim
    return {
        "q_in": (L, Hq, D, HIDDEN),
        "q_out": (L, Hq, HIDDEN, RANK),
        "k_in": (L, Hkv, D, HIDDEN),
        "k_out": (L, Hkv, HIDDEN, RANK),
        "k_mix": (L, Hkv, RANK, RANK),
        "k_scale": (L, Hkv, RANK),
        "k_mix_scale": (L, Hkv, RANK),
        "log_scale": (L, Hq),
    }


def random_maps(geometry: Geometry, seed: int) -> dict[str, Tensor]:
    """Untrained maps of all layers, float32."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in map_shapes(geometry).items():
        if name == "log_scale":
            found[name] = torch.zeros(shape)
        elif name.endswith("scale"):
            found[name] = torch.full(shape, FIRST_SCALE)
        else:
            spread: float = (2.0 / shape[-2]) ** 0.5
            found[name] = torch.randn(shape, generator=generator) * spread
    return found
