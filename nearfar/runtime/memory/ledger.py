"""The one account of far memory: charged where bytes are taken, refused above the cap.

Whoever takes memory has an account and says what it holds in all, so that nothing is counted twice
where something is interrupted, and a collected owner has given back whatever it held.
"""

from __future__ import annotations

import threading
import weakref

from nearfar.config import format_bytes
from nearfar.errors import OutOfMemoryError


class Account:
    """What one owner holds."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """Hold ``num_bytes`` in all; OutOfMemoryError where that takes more, above the cap."""
        if num_bytes > self.num_bytes:
            self._ledger.check(num_bytes - self.num_bytes)
        self.num_bytes = num_bytes


class Ledger:
    """Bytes in use under a cap; None is no cap."""

    def __init__(self, cap_bytes: int | None = None) -> None:
        self.cap_bytes = cap_bytes
        self._accounts: weakref.WeakSet[Account] = weakref.WeakSet()
        self._lock = threading.Lock()  # of the set: it is read in one thread and grows in another

    def open_account(self) -> Account:
        """A new account, which is closed with the last reference to it."""
        account = Account(self)
        with self._lock:
            self._accounts.add(account)
        return account

    @property
    def used_bytes(self) -> int:
        """What all accounts hold."""
        with self._lock:
            return sum(account.num_bytes for account in self._accounts)

    def check(self, more_bytes: int) -> None:
        """Raise OutOfMemoryError where ``more_bytes`` would go above the cap."""
        wanted = self.used_bytes + more_bytes
        if self.cap_bytes is not None and wanted > self.cap_bytes:
            need, have = format_bytes(wanted), format_bytes(self.cap_bytes)
            raise OutOfMemoryError(
                f"Far memory is full: {need} needed, {have} allowed. Raise --far-memory, choose a "
                "smaller --far-dtype, or give a shorter text."
            )
