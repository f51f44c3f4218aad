"""Contexts of random keys and values, to measure speed without a model's weights.

Keys are neither isotropic noise, in which no key stands out, nor so clustered that any index finds
the important ones. As in real models, a head's keys share a large common offset, and their variance
falls like a power of the dimension's rank along directions of the head's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfar.policies.base import LAST_QUERIES
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.steps.query_statistics import QueryStatistics

SPREAD = 2.5  # standard deviation of a logit in nats, for queries of unit variance
DECAY = 1.0  # of the variance, by the rank of the dimension
OFFSET = 2.0  # of a head's mean, in standard deviations of a dimension
PIECE_TOKENS = 8192  # that are made at a time: what they take is near beside the rest


class PowerLawKeys:
    """Keys of one layer, in pieces: a common offset a head, and variance that falls like a power.

    A query of independent standard normal numbers sees logits, scaled by D^-0.5, of standard
    deviation SPREAD: by far the most weight is in about N exp(-SPREAD^2) of N keys.
    """

    def __init__(
        self, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._dtype, self._device = dtype, device
        D = head_dim
        spectrum = torch.arange(1, D + 1, device=device, dtype=torch.float32) ** -DECAY
        sizes = (spectrum / spectrum.mean()).sqrt() * SPREAD
        directions, _ = torch.linalg.qr(self._normal(kv_heads, D, D))
        self._mixing = sizes[:, None] * directions.transpose(1, 2)  # [Hkv, D, D]
        self._offset = self._normal(kv_heads, 1, D) * SPREAD * OFFSET

    def draw(self, count: int) -> Tensor:
        """The next keys [Hkv, count, D]."""
        Hkv, D, _ = self._mixing.shape
        turned = torch.bmm(self._normal(Hkv, count, D), self._mixing)
        return turned.add_(self._offset).to(self._dtype)

    def _normal(self, *sizes: int) -> Tensor:
        return torch.empty(sizes, device=self._device).normal_(generator=self._generator)


def random_context(engine: Engine, tokens: int, seed: int = 0) -> Sequence:
    """A sequence that holds ``tokens`` random keys and values, as if it had read them.

    It is filled piece by piece, so that near memory never holds more than after a real context.
    """
    return engine.hands.run(_random_context, engine, tokens, seed)


def _random_context(engine: Engine, tokens: int, seed: int) -> Sequence:
    decoder, geometry = engine.decoder, engine.model_config.geometry
    sequence = engine.new_sequence()
    near = sequence.settings.sinks + sequence.settings.window
    first = min(tokens, near) if sequence.policy.traits.keeps_far else tokens
    first += (tokens - first) % sequence.far.store.group_tokens  # which stay near
    sequence.announce_prompt(tokens)
    Hkv, Hq, D = geometry.kv_heads, geometry.query_heads, geometry.head_dim
    for layer in range(geometry.layers):
        place = (decoder.dtype, decoder.device, seed * geometry.layers + layer)
        keys = PowerLawKeys(Hkv, D, *place)
        watch = QueryStatistics(decoder, layer, 0, first, sequence.watched)
        # as if every token had got as much attention as any other
        queries = torch.zeros(min(first, LAST_QUERIES), Hq, D, device=decoder.device)
        watch.see(queries, 0)
        stats = watch.stats()
        sequence.absorb_prompt(layer, keys.draw(first), _values(Hkv, first, D, place), stats)
        for start in range(first, tokens, PIECE_TOKENS):
            count = min(PIECE_TOKENS, tokens - start)
            sequence.far.add(layer, keys.draw(count), _values(Hkv, count, D, place))
    sequence.finish_step(tokens)
    return sequence


def _values(Hkv: int, count: int, D: int, place: tuple[torch.dtype, torch.device, int]) -> Tensor:
    dtype, device, _ = place
    return torch.randn(Hkv, count, D, dtype=dtype, device=device)
