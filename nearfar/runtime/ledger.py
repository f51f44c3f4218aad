"""The one account of far memory: charged where bytes are taken, refused above the cap."""

from __future__ import annotations

from nearfar.config import format_bytes
from nearfar.errors import OutOfMemoryError


class Ledger:
    """Bytes in use under a cap; None is no cap."""

    def __init__(self, cap_bytes: int | None = None) -> None:
        self.cap_bytes = cap_bytes
        self.used_bytes = 0

    def charge(self, num_bytes: int) -> None:
        """Take ``num_bytes`` (or give back, if negative); OutOfMemoryError above the cap."""
        wanted = self.used_bytes + num_bytes
        if self.cap_bytes is not None and num_bytes > 0 and wanted > self.cap_bytes:
            need, have = format_bytes(wanted), format_bytes(self.cap_bytes)
            raise OutOfMemoryError(
                f"Far memory is full: {need} needed, {have} allowed. Raise --far-memory, choose a "
                "smaller --far-dtype, or give a shorter text."
            )
        self.used_bytes = wanted
