"""How much of the drawn keys the GPU fetches from host memory itself, so that both end together.

The rates at which host and GPU read far rows depend on both machines, on the row and on how much
memory the rows are strewn over, so they are taken from the first steps and not assumed. The GPU
attends to what is near and then fetches, the host begins a moment later:

    near + fetch share = host (1 - share) + handoff

with ``fetch`` and ``host`` the time that all keys would take. After those steps the share stays: a
sum that is divided elsewhere is rounded otherwise, and equal steps shall give equal results.
"""

from __future__ import annotations

from statistics import median

from nearfar.gpu_kernels.weighted_draw import SHARE_UNIT

FIRST, LEAST, MOST = SHARE_UNIT // 4, SHARE_UNIT // 32, SHARE_UNIT // 2
SETTLING_STEPS = 16
HANDOFF_NS = 8_000  # the host sees a call and the GPU an answer, see docs/log.md


class FetchBalance:
    """The share, in parts of SHARE_UNIT, and the times that it comes from."""

    def __init__(self) -> None:
        self.share = FIRST
        self._near: list[float] = []
        self._fetch: list[float] = []
        self._host: list[float] = []

    @property
    def settled(self) -> bool:
        """Whether the share stays as it is."""
        return len(self._near) >= SETTLING_STEPS

    def restart(self) -> None:
        """Find the share anew, from where it is: there are other sequences."""
        for times in (self._near, self._fetch, self._host):
            times.clear()

    def take(self, near_ns: float, fetch_ns: float, host_ns: float) -> None:
        """Learn how long a step's layers took with the present share."""
        if self.settled:
            return
        share = self.share / SHARE_UNIT
        self._near.append(near_ns)
        self._fetch.append(fetch_ns / share)
        self._host.append(host_ns / (1 - share))
        near, fetch, host = median(self._near), median(self._fetch), median(self._host)
        balanced = (host + HANDOFF_NS - near) / max(fetch + host, 1.0)
        self.share = min(max(round(balanced * SHARE_UNIT), LEAST), MOST)
