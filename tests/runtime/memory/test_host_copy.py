"""Copies to and from registered memory, against a CUDA that behaves like the real one."""

from __future__ import annotations

import pytest
import torch
from pretend_cuda import PAGE, Runtime, pretend_cuda

from nearfar.runtime.memory.host_copy import HostCopies, Registered
from nearfar.runtime.memory.host_memory import reserve


def test_pieces_of_a_range() -> None:
    known = Registered()
    known.spans = {2 * PAGE: 5 * PAGE, 5 * PAGE: 6 * PAGE, 9 * PAGE: 10 * PAGE}
    assert known.pieces(0, PAGE) == [(0, PAGE, False)]
    assert known.pieces(3 * PAGE, 4 * PAGE) == [(3 * PAGE, 4 * PAGE, True)]
    assert known.pieces(PAGE, 11 * PAGE) == [
        (PAGE, 2 * PAGE, False),
        (2 * PAGE, 5 * PAGE, True),
        (5 * PAGE, 6 * PAGE, True),
        (6 * PAGE, 9 * PAGE, False),
        (9 * PAGE, 10 * PAGE, True),
        (10 * PAGE, 11 * PAGE, False),
    ]
    assert known.pieces(7, 7) == []
    ends = [known.reach(place * PAGE) // PAGE for place in (1, 2, 4, 6, 9)]
    assert ends == [1, 6, 6, 6, 10]


def test_pages_that_are_not_registered_yet() -> None:
    known = Registered()
    assert known.free_part(PAGE + 5, 3 * PAGE - 1) == (PAGE, 3 * PAGE)
    known.spans = {PAGE: 3 * PAGE}
    assert known.free_part(2 * PAGE + 9, 7 * PAGE + 1) == (3 * PAGE, 8 * PAGE)
    start, stop = known.free_part(PAGE + 1, 2 * PAGE)
    assert start == stop


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return pretend_cuda(monkeypatch)


def store(heads: int, tokens: int, width: int) -> torch.Tensor:
    """Rows in memory of their own, as far memory has them."""
    memory = torch.from_numpy(reserve(heads * tokens * width * 4)).view(torch.float32)
    return memory.view(heads, tokens, width)


@pytest.mark.parametrize("refuse", [False, True])
@pytest.mark.parametrize("width", [96, 250])  # a row is no divisor of a page
def test_appending_and_bringing_back(runtime: Runtime, width: int, refuse: bool) -> None:
    runtime.refuse = refuse
    heads, tokens = 3, 700
    rows = store(heads, tokens, width)
    copies = HostCopies(torch.device("cpu"))
    everything = torch.randn(heads, tokens, width)
    length = 0
    for count, announced in ((200, True), (3, False), (64, False), (190, True), (1, False)):
        target = rows[:, length : length + count]
        if announced:
            copies.announce(target)
        copies.copy(target, everything[:, length : length + count])
        length += count
        copies.settle()
        reach = copies.readable_tokens([rows])
        assert reach < rows.shape[1]
        for head in rows[:, :reach]:
            start, stop = head.data_ptr(), head.data_ptr() + head.nbytes
            assert copies._registered.reach(start) >= stop
        assert (reach >= 150) == (not refuse)
        torch.testing.assert_close(rows[:, :length], everything[:, :length], rtol=0, atol=0)
        back = torch.full((heads, length, width), torch.nan)
        copies.bring(back, rows[:, :length])
        torch.testing.assert_close(back, everything[:, :length], rtol=0, atol=0)
    assert bool(runtime.spans) == (not refuse)
    copies.close()
    assert not runtime.spans


def test_what_is_announced_and_never_copied_is_let_go(runtime: Runtime) -> None:
    rows = store(2, 500, 64)
    copies = HostCopies(torch.device("cpu"))
    copies.announce(rows)
    copies.close()
    assert not runtime.spans
