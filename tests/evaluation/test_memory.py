from __future__ import annotations

import pytest
from specs import tiny_specs
from tiny_engine import tiny_config, tiny_engine

from nearfar.evaluation.memory import Part, inventory
from nearfar.policies.registry import create_policy, policy_names


@pytest.mark.parametrize("spec", tiny_specs(policy_names()))
@pytest.mark.parametrize("tokens", [150, 3001])
def test_every_byte_was_predicted(spec: str, tokens: int) -> None:
    engine = tiny_engine(tiny_config(layers=3), policy=spec, budget=60)
    found = inventory(engine, tokens)
    scratch = 2**16 if spec.startswith("lsh-tables") else 0  # whatever the context
    for part in found.parts:
        assert part.predicted_bytes == pytest.approx(part.held_bytes, rel=0.05, abs=scratch), part
    assert found.total.held_bytes == sum(part.held_bytes for part in found.parts)
    kinds = {(part.tier, part.name) for part in found.parts}
    far = create_policy(spec).traits.keeps_far
    assert (("far", "keys and values") in kinds) == far
    evicts = create_policy(spec).traits.kind == "evicts"
    assert (("near", "positions and scores") in kinds) == evicts
    assert engine._ledger.used_bytes == 0


def test_errors_are_shares_of_what_is_held() -> None:
    assert Part("near", "x", 90, 100).error == pytest.approx(0.1)
    assert Part("near", "x", 0, 0).error == 0
