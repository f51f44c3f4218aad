"""Attention of every storage type against its reference; run for CPUs that this one can imitate."""

from __future__ import annotations

import sys

import numpy as np
import torch

from nearfar.cpu_kernels import items, reference
from nearfar.cpu_kernels.attend import attend_range
from nearfar.cpu_kernels.attend_tile import head_block
from nearfar.cpu_kernels.vectors import LANES
from nearfar.records import FarView
from nearfar.storage import encode

NONE = np.empty(0, np.int32)


def main() -> None:
    """Lanes and way of converting float16 as told, results as the reference."""
    assert int(sys.argv[1]) == LANES
    assert bool(int(sys.argv[2])) == items.CONVERTS_HALF
    for dtype in (torch.bfloat16, torch.float16, torch.int8):
        for G, D, N in ((3, 64, 75), (3, 20, 41)):
            generator = torch.Generator().manual_seed(D)
            values = torch.randn(1, N, 2, D, generator=generator)
            values[0, 0] *= 1e-7  # subnormal in float16
            far = FarView(encode(values, dtype).view(1, N, 2 * D), N)
            query = torch.randn(G, D, generator=generator) / D**0.5
            out, top, total = torch.empty(G, D), *torch.empty(2, G)
            rows, weights = items.row_array(far.rows)[0], NONE.astype(np.float32)
            results = (out.numpy(), top.numpy(), total.numpy())
            attend_range(head_block(G), rows, query.numpy(), NONE, weights, 0, N, *results)
            want = reference.attend_all(query, far)
            got = (out / total[:, None]).double()
            torch.testing.assert_close(got, want.out, rtol=2e-5, atol=2e-5)
            lse = (top + total.log()).double()
            torch.testing.assert_close(lse, want.lse, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    main()
