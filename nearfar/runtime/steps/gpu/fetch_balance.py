"""The share of the drawn keys that the GPU fetches from host memory, so that both end together.

The rates at which host and GPU read far rows depend on both processors, on the row size and on how
widely the rows are scattered, so the first steps measure them. The GPU attends to near keys and
then fetches; the host begins a moment later:

    near + fetch share = host (1 - share) + handoff

Here ``fetch`` and ``host`` are the times for all keys. After the first steps the share is fixed: a
sum that is divided at another place is rounded differently, and equal steps must give equal
results.
"""

from __future__ import annotations

from statistics import median

from nearfar.gpu_kernels.weighted_draw import SHARE_UNIT

FIRST, LEAST, MOST = SHARE_UNIT // 4, SHARE_UNIT // 32, SHARE_UNIT // 2
SETTLING_STEPS = 16
HANDOFF_NS = 8_000  # until the host sees a request and the GPU its answer, see docs/log.md


class FetchBalance:
    """The share, in parts of SHARE_UNIT, and the times from which it is computed."""

    def __init__(self) -> None:
        self.share = FIRST
        self._near: list[float] = []
        self._fetch: list[float] = []
        self._host: list[float] = []

    @property
    def settled(self) -> bool:
        """Whether the share is fixed."""
        return len(self._near) >= SETTLING_STEPS

    def restart(self) -> None:
        """Measure again, starting from the present share: the sequences have changed."""
        for times in (self._near, self._fetch, self._host):
            times.clear()

    def learn(self, near_ns: float, fetch_ns: float, host_ns: float) -> None:
        """Update the share with the times that a step's layers took with the present one."""
        if self.settled:
            return
        share = self.share / SHARE_UNIT
        self._near.append(near_ns)
        self._fetch.append(fetch_ns / share)
        self._host.append(host_ns / (1 - share))
        near, fetch, host = median(self._near), median(self._fetch), median(self._host)
        balanced = (host + HANDOFF_NS - near) / max(fetch + host, 1.0)
        self.share = min(max(round(balanced * SHARE_UNIT), LEAST), MOST)
