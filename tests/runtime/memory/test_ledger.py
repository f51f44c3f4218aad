from __future__ import annotations

import re

import pytest

from nearfar.errors import OutOfMemoryError
from nearfar.runtime.memory.ledger import Ledger


def test_cap_may_be_reached_and_not_passed() -> None:
    ledger = Ledger(3 * 2**20)
    first, second = ledger.open_account(), ledger.open_account()
    first.hold(2**20)
    second.hold(2**21)
    assert ledger.used_bytes == 3 * 2**20
    message = (
        "Far memory is full: 3.5 MiB needed, 3.0 MiB allowed. Raise --far-memory, choose a smaller "
        "--far-dtype, or give a shorter text."
    )
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(message)}$"):
        first.hold(2**20 + 2**19)
    assert (first.num_bytes, ledger.used_bytes) == (2**20, 3 * 2**20)


def test_what_is_given_back_can_be_taken_again() -> None:
    ledger = Ledger(100)
    account = ledger.open_account()
    account.hold(100)
    account.hold(60)
    account.hold(100)
    with pytest.raises(OutOfMemoryError):
        account.hold(101)


def test_cap_below_what_is_held_still_takes_back() -> None:
    ledger = Ledger()
    account = ledger.open_account()
    account.hold(2**50)
    ledger.cap_bytes = 10
    account.hold(2**49)
    assert ledger.used_bytes == 2**49


def test_an_account_is_closed_with_its_owner() -> None:
    ledger = Ledger(100)
    account = ledger.open_account()
    account.hold(100)
    del account
    assert ledger.used_bytes == 0
    ledger.open_account().hold(100)
