"""The GPU memory that all loaded models of a process may take together.

The allocator of a GPU has one limit for the whole process. Each loaded model has a share: the near
memory allowed to its engine. The limit is the sum of all shares, so that a later model does not
shrink the share of an earlier one, and a model gives its share back when it is freed. If one model
has no cap, all models together may take the whole GPU.
"""

from __future__ import annotations

import itertools
import threading

import torch

from nearfar.runtime.engine.planning.memory_plan import CONTEXT_BYTES

_lock = threading.RLock()  # reentrant: garbage collection inside the lock may release a share
_numbers = itertools.count()
_shares: dict[torch.device, dict[int, int | None]] = {}  # bytes of each; None: no cap


class Share:
    """One model's part of a device, until `release`."""

    def __init__(self, device: torch.device, cap_bytes: int | None) -> None:
        self._device, self._number = device, next(_numbers)
        with _lock:
            _shares.setdefault(device, {})[self._number] = cap_bytes
            _limit(device)

    def release(self) -> None:
        """Give the part back; a second time does nothing."""
        with _lock:
            held = _shares[self._device]
            if self._number in held:
                del held[self._number]
                _limit(self._device)


def take_share(device: torch.device, cap_bytes: int | None) -> Share:
    """Give a model ``cap_bytes`` of ``device``, including CUDA's own memory; None: all of it."""
    return Share(device, cap_bytes)


def allowed_bytes(caps: list[int | None], total_bytes: int) -> int:
    """Bytes that the allocator may hold for models with these ``caps``, at most all of the GPU.

    CUDA's own memory is outside the allocator and is subtracted once.
    """
    known = [cap for cap in caps if cap is not None]
    if not known or len(known) < len(caps):
        return total_bytes
    return min(total_bytes, max(0, sum(known) - CONTEXT_BYTES))


def _limit(device: torch.device) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = allowed_bytes(list(_shares[device].values()), total) / total
        torch.cuda.set_per_process_memory_fraction(share, device)
