"""A CUDA without a GPU, for copies: it registers memory, and refuses what the real one refuses.

A copy of which the host's side lies partly in registered memory is an error. What is copied without
waiting is looked at: it must lie wholly in or wholly out.
"""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

from nearfar.runtime.memory import host_copy

PAGE = mmap.PAGESIZE


class Runtime:
    """cudart, as far as it is used: notes what is registered, refuses what overlaps."""

    def __init__(self) -> None:
        self.spans: dict[int, int] = {}
        self.refuse = False

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:  # noqa: N802
        overlaps = any(a < start + size and start < b for a, b in self.spans.items())
        if self.refuse or overlaps or start % PAGE or size % PAGE or flags:
            return 1
        self.spans[start] = start + size
        return 0

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802
        del self.spans[start]
        return 0


class Nothing:
    """A stream, an event, a context: whatever is called, nothing happens."""

    def __call__(self, *_: Any, **__: Any) -> Nothing:
        return self

    def __getattr__(self, _: str) -> Nothing:
        return self

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """CUDA as copies see it, from now on."""
    cuda = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    for name in ("Stream", "Event", "stream", "device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing())
    monkeypatch.setattr(host_copy, "LEAST_BYTES", 2 * PAGE)
    plain = torch.Tensor.copy_

    def checked(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        for side in (target, source):
            start, stop = side.data_ptr(), side.data_ptr() + side.nbytes
            touched = [a < stop and start < b for a, b in cuda.spans.items()]
            inside = [a <= start and stop <= b for a, b in cuda.spans.items()]
            if non_blocking and any(touched):
                assert any(inside), "CUDA error: invalid argument"
        return plain(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", checked)
    return cuda
