"""The most memory that an act holds at once, of what torch and NumPy allocate for it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import torch


def peak_bytes(act: Callable[[], object]) -> int:
    """Most bytes that torch and NumPy held at once of what they took during ``act``."""
    tracemalloc.start()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        act()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    taken, left = [], list(profile.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            taken.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, size in sorted(taken):
        now += size
        peak = max(peak, now)
    return peak + numpy_peak
