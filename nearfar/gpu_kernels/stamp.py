"""The GPU's clock, read in a stream between kernels."""

from __future__ import annotations

import time

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda


@triton.jit(do_not_specialize=["slot"])
def _stamp(
    times,  # [n] int64, one written
    slot,
):
    tl.store(times + slot, tl.cast(cuda.globaltimer(), tl.int64))


def stamp(times: Tensor, slot: int) -> None:
    """Write the nanoseconds at which the stream came here to ``times[slot]`` int64."""
    if times.is_cuda:
        _stamp[(1,)](times, slot)
    else:
        stamp_reference(times, slot)


def stamp_reference(times: Tensor, slot: int) -> None:
    """`stamp` by the host's clock."""
    times[slot] = time.monotonic_ns()
