"""Predicts the time of the remaining work from the finished work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable


class TimeLeft:
    """Predicts seconds of units of work by the mean of similar units.

    New kinds are assumed to take the mean time per token of known kinds.
    """

    def __init__(self) -> None:
        self._left: dict[tuple[Hashable, int], int] = defaultdict(int)
        self._seconds: dict[tuple[Hashable, int], list[float]] = defaultdict(list)

    def expect(self, kind: Hashable, tokens: int, count: int = 1) -> None:
        """Add ``count`` remaining units of ``kind``, each of about ``tokens`` tokens."""
        self._left[kind, tokens] += count

    def done(self, kind: Hashable, tokens: int, seconds: float | None) -> None:
        """Record a finished unit; None if it existed already and has no time."""
        self._left[kind, tokens] -= 1
        if seconds is not None:
            self._seconds[kind, tokens].append(seconds)

    @property
    def seconds(self) -> float | None:
        """Seconds of the remaining work; None before the first unit is done."""
        seen = [(each, tokens) for (_, tokens), all_ in self._seconds.items() for each in all_]
        if not seen:
            return None
        per_token = sum(each for each, _ in seen) / sum(max(1, tokens) for _, tokens in seen)
        total = 0.0
        for (kind, tokens), count in self._left.items():
            known = self._seconds.get((kind, tokens))
            mean = sum(known) / len(known) if known else per_token * max(1, tokens)
            total += max(0, count) * mean
        return total
