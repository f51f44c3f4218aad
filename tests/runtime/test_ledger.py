from __future__ import annotations

import re

import pytest

from nearfar.errors import OutOfMemoryError
from nearfar.runtime.ledger import Ledger


def test_cap_may_be_reached_and_not_passed() -> None:
    ledger = Ledger(3 * 2**20)
    ledger.charge(2**20)
    ledger.charge(2**21)
    assert ledger.used_bytes == 3 * 2**20
    message = (
        "Far memory is full: 3.5 MiB needed, 3.0 MiB allowed. Raise --far-memory, choose a smaller "
        "--far-dtype, or give a shorter text."
    )
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(message)}$"):
        ledger.charge(2**19)
    assert ledger.used_bytes == 3 * 2**20


def test_what_is_given_back_can_be_taken_again() -> None:
    ledger = Ledger(100)
    ledger.charge(100)
    ledger.charge(-40)
    ledger.charge(40)
    with pytest.raises(OutOfMemoryError):
        ledger.charge(1)


def test_cap_below_what_is_held_still_takes_back() -> None:
    ledger = Ledger()
    ledger.charge(2**50)
    ledger.cap_bytes = 10
    ledger.charge(-(2**49))
    assert ledger.used_bytes == 2**49
