"""What an answer depends on is in a cached document's key and in a saved one's identity."""

from __future__ import annotations

import dataclasses
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from saved_cases import NINE, QUESTION, TEXT, tiny_engine

from nearfar.config import EngineConfig
from nearfar.errors import InvalidOptionError, SavedDocumentError
from nearfar.policies.convolution import random_convolutions
from nearfar.policies.feature_maps import random_maps
from nearfar.policies.registry import create_policy, policy_class, policy_names
from nearfar.policies.snapkv import SnapKV
from nearfar.policies.trained import save_trained
from nearfar.runtime.engine.document_cache import DocumentCache, document_key
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.saved.facts import Facts
from nearfar.runtime.saved.write_document import facts_of
from nearfar.runtime.text import templates
from nearfar.runtime.text.tokenizer import Tokenizer

MAKERS = {"less": random_maps, "lococo": random_convolutions}
every_trained = pytest.mark.parametrize("policy", MAKERS)

# fields of EngineConfig with another value than the default: those that change what is kept ...
CHANGING: dict[str, Any] = {
    "policy": "h2o:recent_share=0.25",
    "budget": 17,
    "sinks": 5,
    "window": 9,
    "dtype": "bfloat16",
    "far_dtype": "float16",
    "device": "cuda",
}
# ... and those that do not: where it is computed, how much room there is, what is drawn later
WITHOUT_EFFECT: dict[str, Any] = {
    "threads": 7,
    "near_memory_bytes": 10**9,
    "far_memory_bytes": 10**9,
    "chunk_tokens": 7,
    "seed": 4,
}
# ... and those that the tokenizer is told, whose template is in the key as it is rendered
BY_TOKENIZER = {"thinking"}
# of a saved document: what it is called, in which types it lies, how long it took, what helps
FACTS_WITHOUT_EFFECT = {"model", "near_dtype", "row_format", "read_seconds", "indexes"}
TEXTS = {"score": "h2o", "pool": "avg"}  # another value of parameters that are texts
EVICTING = [name for name in policy_names() if policy_class(name).traits.kind == "evicts"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("model"))


def key(engine: Engine, tokenizer: Tokenizer | None = None, **changes: Any) -> str:
    config = engine.config.replace(**changes)
    return document_key(engine.model, tokenizer or engine.tokenizer, TEXT, config)


def maps(engine: Engine, path: Path, policy: str, seed: int) -> str:
    """Write maps of ``seed`` to ``path``; the policy that reads them."""
    geometry = engine.model_config.geometry
    save_trained(path, policy, geometry, MAKERS[policy](geometry, seed), {}, overwrite=True)
    return f"{policy}:maps={path}"


def test_every_setting_is_known() -> None:
    """A new field of EngineConfig belongs into the key, or to those without effect."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    assert names == CHANGING.keys() | WITHOUT_EFFECT.keys() | BY_TOKENIZER


@pytest.mark.parametrize("field", CHANGING)
def test_a_setting_changes_the_key(
    base: Engine, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    engine = base.with_policy("h2o") if field == "budget" else base  # others keep all keys
    assert key(engine, **{field: CHANGING[field]}) != key(engine)


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_a_setting_without_effect_does_not(base: Engine, field: str) -> None:
    assert key(base, **{field: WITHOUT_EFFECT[field]}) == key(base)


def other(value: Any) -> Any:
    """Another value of a policy's parameter."""
    if isinstance(value, bool):
        return not value
    return value * 0.5 + 0.125 if isinstance(value, float) else value + 2


@pytest.mark.parametrize("name", EVICTING)
def test_every_parameter_of_what_evicts_is_in_the_key(base: Engine, name: str) -> None:
    given = {"maps": "random"} if name in MAKERS else {}
    for field in dataclasses.fields(policy_class(name)):
        if field.name == "maps":
            continue  # its content counts, see below
        value = TEXTS.get(field.name) or other(field.default)
        spec = ":".join([name, *(f"{k}={v}" for k, v in given.items())])
        assert key(base, policy=f"{spec}:{field.name}={value}") != key(base, policy=spec), (
            field.name
        )


@every_trained
def test_maps_are_what_they_hold_and_not_where(base: Engine, policy: str, tmp_path: Path) -> None:
    first = key(base, policy=maps(base, tmp_path / "one", policy, 0))
    shutil.copy(tmp_path / "one", tmp_path / "two")
    assert key(base, policy=f"{policy}:maps={tmp_path}/two") == first
    assert key(base, policy=maps(base, tmp_path / "one", policy, 1)) != first
    with pytest.raises(InvalidOptionError, match=f"^Cannot read {re.escape(str(tmp_path))}/none: "):
        key(base, policy=f"{policy}:maps={tmp_path}/none")


@every_trained
def test_other_maps_at_the_same_path_are_read_with(
    base: Engine, policy: str, tmp_path: Path
) -> None:
    """One process or several, by the cache or without it: nothing of the old maps is left."""
    cache, path = DocumentCache(tmp_path / "documents"), tmp_path / "maps"
    engine = base.with_policy(maps(base, path, policy, 0))
    old = cache.read(engine, TEXT)
    old.save(tmp_path / "old.nearfar")
    spec = maps(base, path, policy, 1)
    old.save(tmp_path / "old too.nearfar")  # read with the maps that were there before
    engine = base.with_policy(spec)
    new = cache.read(engine, TEXT)
    assert not new.was_opened
    assert cache.read(engine, TEXT).was_opened
    copy = base.with_policy(f"{policy}:maps={shutil.copy(path, tmp_path / 'copy')}")
    assert cache.read(copy, TEXT).was_opened
    want = copy.read(TEXT).ask(QUESTION, NINE).token_ids
    assert new.ask(QUESTION, NINE).token_ids == want
    for name in ("old", "old too"):
        text = (
            f"{tmp_path}/{name}.nearfar holds what {policy} with a budget of 16 kept, and {policy} "
            "with a budget of 16 needs to choose its own while reading, with another value of maps."
        )
        with pytest.raises(SavedDocumentError, match=f"^{re.escape(text)}"):
            engine.open(tmp_path / f"{name}.nearfar")


def test_a_wrapped_policy_counts_with_its_files(
    base: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(base, policy="adakv")
    monkeypatch.setattr(SnapKV, "contents", lambda _: {"file": "0123"})
    assert create_policy("adakv").described()["score.file"] == "0123"
    assert key(base, policy="adakv") != before


class Friday(datetime):
    @classmethod
    def now(cls, _: Any = None) -> Any:
        return datetime(2026, 11, 27)


def test_what_a_template_shows_is_in_the_key(
    base: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = base.tokenizer._first.to_str()
    plain = "{{ messages[0]['content'] }}"
    dated = "{{ strftime_now('%d %b %Y') }} " + plain
    keys = {key(base)}
    for template in (plain, plain + " end", dated):
        keys.add(key(base, Tokenizer(definition, {}, template)))
    monkeypatch.setattr(templates, "datetime", Friday)
    keys.add(key(base, Tokenizer(definition, {}, dated)))
    assert len(keys) == 5
    assert key(base, Tokenizer(definition, {}, plain)) in keys


def test_thinking_is_in_the_key_where_it_changes_what_is_before_the_document(base: Engine) -> None:
    definition = base.tokenizer._first.to_str()
    content, switch = "{{ messages[0]['content'] }}", "{{ enable_thinking }}"
    for template, count in ((switch + content, 3), (content + switch, 1)):
        tokenizer = Tokenizer(definition, {}, template)
        told = [tokenizer.with_thinking(thinking) for thinking in (None, True, False)]
        assert len({key(base, each) for each in told}) == count


def test_a_release_reads_for_itself(base: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(base)
    monkeypatch.setattr("nearfar.runtime.engine.document_cache.__version__", "0.0.0")
    assert key(base) != before


def test_every_fact_is_in_a_documents_identity(base: Engine) -> None:
    document = base.with_policy("h2o").read(TEXT)
    facts = facts_of(document._held, base.model)
    others: dict[str, Any] = {
        "geometry": dataclasses.replace(facts.geometry, layers=9),
        "kept": None,
        "indexes": ({"index": "sketch"},),
    }
    for field in dataclasses.fields(Facts):
        value = getattr(facts, field.name)
        changed = others.get(field.name, f"{value}x" if isinstance(value, str) else 9)
        same = dataclasses.replace(facts, **{field.name: changed}).identity(b"")
        assert (same == facts.identity(b"")) == (field.name in FACTS_WITHOUT_EFFECT), field.name
    assert facts.identity(b"1") != facts.identity(b"")
