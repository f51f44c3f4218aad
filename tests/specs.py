"""Every policy as tests on tiny models name it: small tables keep them quick, and what was trained
for a larger model is taken untrained."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nearfar.config import Budget
from nearfar.policies.registry import create_policy
from nearfar.records import Geometry

LSH = "lsh-tables:num_tables=20"
TINY = {"lsh-tables": LSH, "less": "less:maps=random", "lococo": "lococo:maps=random"}
GEOMETRY = Geometry(2, 6, 2, 16)


def tiny_specs(names: list[str]) -> list[str]:
    """``names`` with what a tiny model needs."""
    return [TINY.get(name, name) for name in names]


def representatives(names: Iterable[str]) -> list[str]:
    """One policy of each kind, as `tiny_specs` has them: the first in ``names``, or the default.

    For what is under test is not the policy but something that treats all of a kind alike. Every
    policy is in `tests/policies/test_contract.py`.
    """
    found: dict[object, str] = {}
    for spec in tiny_specs(sorted(names, key=lambda name: name != "sketch")):
        found.setdefault(_kind(spec), spec)
    return list(found.values())


def quick(names: Iterable[str]) -> list[str]:
    """One policy of each way to keep keys, for `make test-fast`."""
    found: dict[object, str] = {}
    for spec in tiny_specs(sorted(names, key=lambda name: name != "sketch")):
        traits = create_policy(spec).traits
        found.setdefault((traits.kind, traits.keeps_far, traits.evicts_once), spec)
    return list(found.values())


def _kind(spec: str) -> object:
    """What the rooms above ask a policy about itself."""
    policy = create_policy(spec)
    traits = policy.traits
    index = policy.new_index(GEOMETRY, Budget(30), 0)
    return (
        *(traits.kind, traits.keeps_far, traits.needs_attention, traits.positions),
        *(traits.evicts_once, traits.ragged, traits.watches),
        policy.predict_evicted_summary_bytes(GEOMETRY) > 0,
        policy.new_merger(GEOMETRY, torch.device("cpu")) is not None,
        None if index is None else index.form() is not None,
    )
