from __future__ import annotations

import json

import pytest
from fake_engine import nearfar

from nearfar.policies import registry


def test_json_has_every_policy_with_what_it_needs() -> None:
    result = nearfar("policies", "--json")
    assert result.exit_code == 0, result.output
    records = {record["name"]: record for record in json.loads(result.stdout)["policies"]}
    assert list(records) == registry.policy_names()
    assert all(record["error"] is None for record in records.values())
    assert records["streaming-llm"]["positions"] == "cache-index"
    assert records["h2o"]["needs_attention"] is True
    assert records["sketch"]["kind"] == "selects"
    assert records["lsh-tables"]["parameters"]["num_tables"] > 0


def test_table() -> None:
    text = nearfar("policies").stdout
    for name in registry.policy_names():
        assert name in text
    assert "attention scores" in text
    assert "evicts once" in text
    assert "nearfar[rivals]" in text


def test_a_policy_that_does_not_load_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "full", "nearfar.policies.gone:Full")
    result = nearfar("policies", "--json")
    assert result.exit_code == 0
    records = {record["name"]: record for record in json.loads(result.stdout)["policies"]}
    assert records["full"]["error"].startswith("ModuleNotFoundError: No module named")
    assert records["full-far"]["error"] is None
    assert "cannot be loaded" in nearfar("policies").stdout
