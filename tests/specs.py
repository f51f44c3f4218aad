"""Every policy as tests on tiny models name it: small tables keep them quick, and what was trained
for a larger model is taken untrained."""

from __future__ import annotations

LSH = "lsh-tables:num_tables=20"
TINY = {"lsh-tables": LSH, "less": "less:maps=random", "lococo": "lococo:maps=random"}


def tiny_specs(names: list[str]) -> list[str]:
    """``names`` with what a tiny model needs."""
    return [TINY.get(name, name) for name in names]
