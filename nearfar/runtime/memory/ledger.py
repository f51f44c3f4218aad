"""The account of far (host) memory: every allocation is charged, and refused above the cap.

Every owner of memory has an account and reports its total, so that an interruption counts nothing
twice. An owner that is garbage-collected gives its bytes back.
"""

from __future__ import annotations

import threading
import weakref

from nearfar.config import format_bytes
from nearfar.errors import OutOfMemoryError


class Account:
    """The bytes that one owner holds."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """Set the owner's total to ``num_bytes``; OutOfMemoryError if it grows above the cap."""
        if num_bytes > self.num_bytes:
            self._ledger.check(num_bytes - self.num_bytes)
        self.num_bytes = num_bytes


class Ledger:
    """Bytes in use under a cap; None means no cap."""

    def __init__(self, cap_bytes: int | None = None) -> None:
        self.cap_bytes = cap_bytes
        self._accounts: weakref.WeakSet[Account] = weakref.WeakSet()
        self._lock = threading.Lock()  # for the set: one thread may read it while another adds

    def open_account(self) -> Account:
        """A new account; it is closed with the last reference to it."""
        account = Account(self)
        with self._lock:
            self._accounts.add(account)
        return account

    @property
    def used_bytes(self) -> int:
        """Bytes of all accounts."""
        with self._lock:
            return sum(account.num_bytes for account in self._accounts)

    def check(self, more_bytes: int) -> None:
        """Raise OutOfMemoryError if ``more_bytes`` more would exceed the cap."""
        wanted = self.used_bytes + more_bytes
        if self.cap_bytes is not None and wanted > self.cap_bytes:
            need, have = format_bytes(wanted), format_bytes(self.cap_bytes)
            raise OutOfMemoryError(
                f"Far memory is full: {need} needed, {have} allowed. Raise --far-memory, choose a "
                "smaller --far-dtype, or give a shorter text."
            )
