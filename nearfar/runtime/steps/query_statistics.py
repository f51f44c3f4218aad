"""What the queries of a prompt tell about the keys of a layer, gathered chunk by chunk.

A policy names what it watches (`Traits.watches`); the sums of the attention matrix's columns come
from the log-sum-exp of the attention that the prompt is read with, so they change nothing else.
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

SKIPPED_QUERIES = 4  # first ones, which are unlike all others


class QueryStatistics:
    """One layer of one prompt of T tokens after ``past`` others, to whatever was asked for."""

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
        """Whether all queries must attend, also those whose output nobody uses."""
        return "sums" in self._wanted

    def see(self, queries: Tensor, first_position: int) -> None:
        """The next ``queries`` [n, Hq, D], rotated to positions from ``first_position`` on."""
        scaled = queries.transpose(0, 1).float() * self._decoder.softmax_scale
        if "last" in self._wanted:
            kept = scaled if self._last is None else torch.cat([self._last, scaled], 1)
            self._last = kept[:, -LAST_QUERIES:].clone()
        if "moments" in self._wanted:
            self._add_moments(scaled[:, self._skipped :], first_position + self._skipped)
            self._skipped = max(0, self._skipped - len(queries))

    def see_attention(self, queries: Tensor, keys: Tensor, partial: Partial) -> None:
        """What ``queries`` [Hq, n, D] attended to, the last n of the ``keys`` [Hkv, N, D]."""
        if "sums" in self._wanted:
            scale = self._decoder.softmax_scale
            self._sums[:, : keys.shape[1]] += column_sums(queries, keys, partial.lse, scale)

    def stats(self) -> PromptQueryStats | None:
        """All that was seen."""
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
    """What `rotate` turned into ``x`` [heads, n, D] at ``angles`` [n, D]."""
    cos, sin = (each[None] for each in angles)
    # yarn scales both, so that a rotation there and back is as long as their squares say
    length = cos.square() + sin.square()
    return rotate(x, Angles(cos / length, -sin / length))


def layer_angles(decoder: Decoder, layer: int) -> Callable[[Tensor], Angles]:
    """The angles of any positions in ``layer``, none where it does not rotate."""

    def angles(positions: Tensor) -> Angles:
        found = decoder.layer_angles(layer, positions)
        if found is not None:
            return found
        D = decoder.plan.geometry.head_dim
        return no_rotation(torch.empty(*positions.shape, D, device=positions.device))

    return angles
