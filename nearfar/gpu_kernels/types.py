"""Types of Triton and of torch for each other, and sizes that kernels need as powers of two."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Triton reads the variable when a kernel is decorated
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
}


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of ``dtype``."""
    return _TRITON_TYPES[dtype]


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``number`` and ``least``."""
    return int(triton.next_power_of_2(max(number, least)))
