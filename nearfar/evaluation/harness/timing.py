"""How long what is left will take, from what was done so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable


class TimeLeft:
    """Predicts seconds of units of work by the mean of like ones.

    Kinds that were not seen yet are taken for as slow as the mean per token of those that were.
    """

    def __init__(self) -> None:
        self._left: dict[tuple[Hashable, int], int] = defaultdict(int)
        self._seconds: dict[tuple[Hashable, int], list[float]] = defaultdict(list)

    def expect(self, kind: Hashable, tokens: int, count: int = 1) -> None:
        """There are ``count`` more units of ``kind``, each about so many ``tokens``."""
        self._left[kind, tokens] += count

    def done(self, kind: Hashable, tokens: int, seconds: float | None) -> None:
        """One unit is done; None: it was there already and says nothing."""
        self._left[kind, tokens] -= 1
        if seconds is not None:
            self._seconds[kind, tokens].append(seconds)

    @property
    def seconds(self) -> float | None:
        """Of all that is left; None before anything was done."""
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
