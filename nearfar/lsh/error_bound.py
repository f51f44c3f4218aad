"""Bounds the difference between attention over a sample and over all keys.

With keys read with probability pi_i, a_i = exp(logit_i) / pi_i, Z = sum of a and p = a / Z, the
output sum p_i v_i is a ratio of two unbiased sums. Linearised, its error is a sum over independent
draws, whose variance the sample itself estimates (Horvitz and Thompson, 1952):

    E |out - true|^2 = sum over the sample of (1 - pi_i) p_i^2 |v_i - out|^2
    E (Z - true)^2 / Z^2 = sum over the sample of (1 - pi_i) p_i^2

By the central limit theorem a sum of so many terms is about Gaussian. For a given variance the norm
of a Gaussian vector has its heaviest tail if all variance is in one direction, so the normal
quantile bounds both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SampleError(NamedTuple):
    """Standard errors [G] of the results of G query heads from one sample, relative to these."""

    output: Tensor  # of the output, by its norm
    mass: Tensor  # of the sum of exp(logit)
    read_mass: Tensor  # share of that sum that is of keys that were read


def sample_error(query: Tensor, keys: Tensor, values: Tensor, log_weights: Tensor) -> SampleError:
    """Of ``query`` [G, D] over sampled ``keys`` and ``values`` [m, D], weighed -log pi [m]."""
    p = (query @ keys.T + log_weights).softmax(-1)
    out = p @ values
    pi = torch.exp(-log_weights)
    spread = (1 - pi) * p.square()
    # |v - out|^2 without a tensor [G, m, D]
    squares = values.square().sum(-1) - 2 * out @ values.T + out.square().sum(-1, keepdim=True)
    variance = (spread * squares.clamp(min=0)).sum(-1)
    norm = out.norm(dim=-1).clamp(min=torch.finfo(out.dtype).tiny)
    return SampleError(variance.sqrt() / norm, spread.sum(-1).sqrt(), (p * pi).sum(-1))
