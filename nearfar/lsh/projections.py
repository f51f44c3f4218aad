"""Random hyperplanes, and the codes they give to vectors.

SimHash (Charikar 2002): a vector's bit is its side of a hyperplane, so two vectors at angle a agree
in a bit with probability 1 - a / pi. One set of hyperplanes serves all layers, heads and sequences.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.cpu_kernels.hash_codes import pack_codes

CHUNK_VECTORS = 1024  # their scores are the only temporary: 6 MB for 150 tables of 10 bits


@dataclass(frozen=True)
class Projections:
    """Hyperplanes of ``num_tables`` hash tables whose codes have ``bits_per_table`` bits."""

    planes: torch.Tensor  # [num_tables * bits_per_table, D] float32, normals, not normalised
    bits_per_table: int  # 1 to 16
    num_tables: int

    def write_codes(self, vectors: torch.Tensor, codes: NDArray[np.uint16], first: int) -> None:
        """Write the codes of ``vectors`` [n, D] float32 to ``codes[:, first:first + n]``.

        ``codes`` is [num_tables, capacity] uint16, C-contiguous.
        """
        for start in range(0, len(vectors), CHUNK_VECTORS):
            scores = self.planes @ vectors[start : start + CHUNK_VECTORS].T
            pack_codes(scores.numpy(), self.bits_per_table, codes, first + start)

    def codes(self, vectors: torch.Tensor) -> NDArray[np.uint16]:
        """Codes [num_tables, n] uint16 of ``vectors`` [n, D] float32."""
        codes = np.empty((self.num_tables, len(vectors)), np.uint16)
        self.write_codes(vectors, codes, 0)
        return codes


@functools.lru_cache(maxsize=4)
def random_projections(
    head_dim: int, bits_per_table: int, num_tables: int, seed: int
) -> Projections:
    """Gaussian hyperplanes, the same for the same arguments; shared, so not to be written to."""
    generator = np.random.Generator(np.random.Philox(seed))
    planes = generator.standard_normal((num_tables * bits_per_table, head_dim), np.float32)
    return Projections(torch.from_numpy(planes), bits_per_table, num_tables)
