"""Vector kernels against their references; run for CPUs that this one can imitate."""

from __future__ import annotations

import sys

import numpy as np
import torch

from nearfar.cpu_kernels import items, reference, sketch_reference
from nearfar.cpu_kernels.attend import attend_range
from nearfar.cpu_kernels.attend_tile import head_block
from nearfar.cpu_kernels.byte_dots import BYTE_DOTS
from nearfar.cpu_kernels.draw import drawn_lanes
from nearfar.cpu_kernels.sketch_codes import RUN_KEYS, round_queries, score_run, words_per_key
from nearfar.cpu_kernels.vectors import LANES
from nearfar.cpu_kernels.weigh import exp_run
from nearfar.records import FarView
from nearfar.storage import FORMATS, encode_rows

NONE = np.empty(0, np.int32)


def check_attention(dtype: torch.dtype, G: int, D: int, N: int) -> None:
    """`attend_range` of one KV head."""
    generator = torch.Generator().manual_seed(D)
    values = torch.randn(1, N, 2, D, generator=generator)
    values[0, 0] *= 1e-7  # subnormal in float16
    far = FarView(encode_rows(values[:, :, 0], values[:, :, 1], dtype), N)
    query = torch.randn(G, D, generator=generator) / D**0.5
    out, top, total = torch.empty(G, D), *torch.empty(2, G)
    rows, weights = items.row_array(far.rows)[0], NONE.astype(np.float32)
    results = (out.numpy(), top.numpy(), total.numpy())
    attend_range(head_block(G), rows, query.numpy(), NONE, weights, 0, N, *results)
    want = reference.attend_all(query, far)
    got = (out / total[:, None]).double()
    torch.testing.assert_close(got, want.out, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close((top + total.log()).double(), want.lse, rtol=1e-5, atol=1e-5)


def check_selection(bits: int, G: int, D: int) -> None:
    """Scores of random codes, their numerators, and the lanes that are drawn."""
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**32, (16, words_per_key(D, bits), 64)).astype(np.uint32)
    factors = rng.random(RUN_KEYS).astype(np.float32)
    queries, scales = round_queries(rng.standard_normal((1, G, D)).astype(np.float32))
    got, want = np.full((2, G, RUN_KEYS), np.nan, np.float32)
    score_run(words, factors, queries[0], scales[0], bits, 0, 16, got)
    codes = (words[None], factors[None], queries, scales, RUN_KEYS, bits)
    sketch_reference.score_codes(*codes, want[None])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    numerators, (top, mass) = np.empty_like(got), np.empty((2, G), np.float32)
    for g in range(G):
        exp_run(got, g, 0.7, numerators, 0, top, mass)
    exact = np.exp(0.7 * (got.astype(np.float64) - top[:, None]))
    np.testing.assert_allclose(numerators, exact, rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(mass, exact.sum(1), rtol=1e-5)
    mask = int(drawn_lanes(numerators, 0, 0, np.float32(1), np.uint32(9)))
    uniforms = sketch_reference.uniforms(LANES, 9)
    assert [bool(mask >> i & 1) for i in range(LANES)] == (
        uniforms < numerators[0, :LANES]
    ).tolist()


def main() -> None:
    """Lanes, way of converting float16 and byte products as told, results as the references."""
    lanes, converts_half, byte_dots = sys.argv[1:]
    assert int(lanes) == LANES
    assert bool(int(converts_half)) == items.CONVERTS_HALF
    assert byte_dots == BYTE_DOTS.name
    for dtype in (torch.bfloat16, torch.float16, torch.int8):
        for D, N in ((64, 75), (20, 41)):
            check_attention(dtype, 3, D, N)
    for packed in ("int4", "kivi-4", "kivi-2"):
        for G in (3, 8):
            check_attention(FORMATS[packed], G, 96, 64)
    for bits in (1, 2, 3, 4):
        for D in (64, 33):
            check_selection(bits, 3, D)


if __name__ == "__main__":
    main()
