"""The one random rotation that keys and queries share."""

from __future__ import annotations

from functools import cache

import torch

ROTATION_SEED = 20240521


@cache
def rotation(head_dim: int, seed: int = ROTATION_SEED) -> torch.Tensor:
    """A random orthogonal matrix [D, D] float32, uniform over rotations and reflections.

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q (Mezzadri, arXiv
    math-ph/0609050). Coordinates of a rotated vector are nearly Gaussian for every vector.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    turned: torch.Tensor = (q * torch.sign(torch.diagonal(r))).float()
    return turned
