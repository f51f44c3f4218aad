"""Contexts of random keys and values, to measure speed where no weights can be had.

Keys are not isotropic noise, among which nothing stands out, and not so clustered that anything
finds the few that matter. As in real models, a head's keys share a large common offset, and their
variance falls like a power of the dimension's rank along directions of the head's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfar.runtime.engine import Engine
from nearfar.runtime.sequence import Sequence

SPREAD = 2.5  # standard deviation of a logit in nats, for queries of unit variance
DECAY = 1.0  # of the variance, by the rank of the dimension
OFFSET = 2.0  # of a head's mean, in standard deviations of a dimension


def power_law_keys(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> Tensor:
    """Keys [Hkv, N, D] with a common offset and a spectrum that falls like rank^-DECAY.

    A query of independent standard normal numbers sees logits, scaled by D^-0.5, of standard
    deviation SPREAD: by far the most weight is in about N exp(-SPREAD^2) keys.
    """
    Hkv, N, D = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, device=device).normal_(generator=generator)

    spectrum = torch.arange(1, D + 1, device=device, dtype=torch.float32) ** -DECAY
    sizes = (spectrum / spectrum.mean()).sqrt() * SPREAD
    keys = torch.empty(shape, dtype=dtype, device=device)
    for head in range(Hkv):
        directions, _ = torch.linalg.qr(normal(D, D))
        turned = (normal(N, D) * sizes) @ directions.T
        keys[head] = turned.add_(normal(D) * SPREAD * OFFSET)
    return keys


def random_context(engine: Engine, tokens: int, seed: int = 0) -> Sequence:
    """A sequence that holds ``tokens`` random keys and values, as if it had read them."""
    device, dtype = engine.decoder.device, engine.decoder.dtype
    sequence, geometry = engine.new_sequence(), engine.model_config.geometry
    shape = (geometry.kv_heads, tokens, geometry.head_dim)
    generator = torch.Generator(device).manual_seed(seed)
    received = None
    if engine.policy.traits.needs_attention:
        received = torch.ones(geometry.query_heads, tokens, device=device)
    for layer in range(geometry.layers):
        keys = power_law_keys(shape, dtype, device, seed * geometry.layers + layer)
        values = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        sequence.absorb_prompt(layer, keys, values, received)
    sequence.finish_step(tokens)
    return sequence
