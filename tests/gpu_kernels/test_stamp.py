from __future__ import annotations

import torch
from kernel_cases import DEVICE

from nearfar.gpu_kernels.stamp import stamp


def test_later_stamps_are_later() -> None:
    times = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for slot in (2, 0):
        stamp(times, slot)
    last, unwritten, first = times.tolist()
    assert 0 < first <= last
    assert unwritten == 0
