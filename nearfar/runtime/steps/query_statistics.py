"""Statistics of a prompt's queries in one layer, gathered chunk by chunk.

A policy names the statistics that it needs (`Traits.watches`). The column sums of the attention
matrix are computed from the log-sum-exp of prefill's own attention and do not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from nearfar.policies.base import LAST_QUERIES, Moments, PromptQueryStats, Watched
from nearfar.records import Partial
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.rope import Angles, rotate
from nearfar.runtime.steps.gpu_prefill import no_rotation
from nearfar.runtime.steps.prompt_attention import column_sums

SKIPPED_QUERIES = 4  # the first queries, which are unlike all others


class QueryStatistics:
    """The ``wanted`` statistics of one layer, for a prompt of T tokens after ``past`` others."""

    def __init__(
        self, decoder: Decoder, layer: int, past: int, T: int, wanted: Collection[Watched]
    ) -> None:
        geometry, device = decoder.plan.geometry, decoder.device
        self._decoder, self._layer, self._wanted = decoder, layer, wanted
        self._skipped = SKIPPED_QUERIES if T > SKIPPED_QUERIES else 0
        self._last: Tensor | None = None
        self._count = 0
        Hq, D = geometry.query_heads, geometry.head_dim
        if "sums" in wanted:
            self._sums = torch.zeros(Hq, past + T, device=device)
        if "moments" in wanted:
            self._sum = torch.zeros(Hq, D, dtype=torch.float64, device=device)
            self._products = torch.zeros(Hq, D, D, dtype=torch.float64, device=device)

    @property
    def needs_all_attention(self) -> bool:
        """Whether all queries must attend, even if only the last token's output is used."""
        return "sums" in self._wanted

    def see(self, queries: Tensor, first_position: int) -> None:
        """Add the next ``queries`` [n, Hq, D], rotated to positions from ``first_position`` on."""
        scaled = queries.transpose(0, 1).float() * self._decoder.softmax_scale
        if "last" in self._wanted:
            kept = scaled if self._last is None else torch.cat([self._last, scaled], 1)
            self._last = kept[:, -LAST_QUERIES:].clone()
        if "moments" in self._wanted:
            self._add_moments(scaled[:, self._skipped :], first_position + self._skipped)
            self._skipped = max(0, self._skipped - len(queries))

    def see_attention(self, queries: Tensor, keys: Tensor, partial: Partial) -> None:
        """Add the attention of ``queries`` [Hq, n, D] of the last n of ``keys`` [Hkv, N, D]."""
        if "sums" in self._wanted:
            scale = self._decoder.softmax_scale
            self._sums[:, : keys.shape[1]] += column_sums(queries, keys, partial.lse, scale)

    def stats(self) -> PromptQueryStats | None:
        """The statistics of all queries so far; None if none are wanted."""
        if not self._wanted:
            return None
        return PromptQueryStats(
            layer_angles(self._decoder, self._layer),
            self._sums if "sums" in self._wanted else None,
            self._last,
            self._moments() if "moments" in self._wanted else None,
        )

    def _add_moments(self, scaled: Tensor, first_position: int) -> None:
        if self._decoder.uses_rope(self._layer):
            ends = (first_position, first_position + scaled.shape[1])
            positions = torch.arange(*ends, device=scaled.device)
            scaled = unrotate(scaled, self._decoder.rotary(self._layer).angles(positions))
        self._count += scaled.shape[1]
        self._sum += scaled.double().sum(1)
        self._products += (scaled.transpose(1, 2) @ scaled).double()

    def _moments(self) -> Moments:
        mean = self._sum / self._count
        covariance = self._products / self._count - mean[:, :, None] * mean[:, None]
        return Moments(mean.float(), covariance.float())


def unrotate(x: Tensor, angles: Angles) -> Tensor:
    """The inverse of `rotate`: ``x`` [heads, n, D] before its rotation by ``angles`` [n, D]."""
    cos, sin = (each[None] for each in angles)
    # YaRN scales both, so a rotation and its inverse multiply the length by their squares' sum
    length = cos.square() + sin.square()
    return rotate(x, Angles(cos / length, -sin / length))


def layer_angles(decoder: Decoder, layer: int) -> Callable[[Tensor], Angles]:
    """A function from positions to angles in ``layer``; zero angles if it does not rotate."""

    def angles(positions: Tensor) -> Angles:
        found = decoder.layer_angles(layer, positions)
        if found is not None:
            return found
        D = decoder.plan.geometry.head_dim
        return no_rotation(torch.empty(*positions.shape, D, device=positions.device))

    return angles
