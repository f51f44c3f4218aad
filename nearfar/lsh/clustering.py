"""k-means over many small sets of keys at once, by angle to each set's mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  its usual name

ITERATIONS = 8


def cluster_by_angle(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Cluster numbers [..., n] int64, 0 to ``count`` - 1, of ``keys`` [..., n, D] float32.

    Spherical k-means of the keys less their mean, begun from ``count`` keys at equal distances in
    token order, so that the same keys always give the same clusters. A cluster that loses all of
    its keys stays where it was, empty.
    """
    n = keys.shape[-2]
    directions = F.normalize(keys - keys.mean(-2, keepdim=True), dim=-1)
    centres = directions[..., torch.arange(count) * n // count, :]
    for _ in range(ITERATIONS):
        member = F.one_hot((directions @ centres.transpose(-1, -2)).argmax(-1), count).float()
        sums = member.transpose(-1, -2) @ directions
        empty = member.sum(-2)[..., None] == 0
        centres = torch.where(empty, centres, F.normalize(sums, dim=-1))
    return (directions @ centres.transpose(-1, -2)).argmax(-1)
