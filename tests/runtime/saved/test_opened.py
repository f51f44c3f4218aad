"""The file of a document that is opened: its facts, its sources, and which policy it is for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from saved_cases import FACTS

from nearfar.errors import DamagedDocumentError, SavedDocumentError
from nearfar.policies.registry import create_policy
from nearfar.runtime.memory.sequence_settings import SequenceSettings
from nearfar.runtime.saved import container
from nearfar.runtime.saved.facts import Facts, Kept
from nearfar.runtime.saved.opened import check_policy, open_facts, source_names
from nearfar.runtime.saved.write_document import plain
from nearfar.runtime.saved.writing import write_container


def written(path: Path, facts: object, sources: bytes = b"[]", kind: str = "document") -> Path:
    section = plain("sources", np.frombuffer(sources, np.uint8))
    write_container(path, {"kind": kind, "facts": facts}, [section])
    return path


def test_facts_and_sources_are_those_of_the_file(tmp_path: Path) -> None:
    sources = json.dumps([{"name": "one.txt"}, {"name": "two.txt"}]).encode()
    with open_facts(written(tmp_path / "a", FACTS.as_json(), sources)) as opened:
        assert opened.facts == FACTS
        assert source_names(opened.container) == ["one.txt", "two.txt"]
    assert opened.container.file.closed


@pytest.mark.parametrize("sources", [b"{", b"[1]", b"[{}]", b"7", b"\xff"])
def test_sources_that_cannot_be_are_damage(tmp_path: Path, sources: bytes) -> None:
    path = written(tmp_path / "a", FACTS.as_json(), sources)
    text = rf"^{re.escape(str(path))} is damaged: it is not valid \("
    with open_facts(path) as opened, pytest.raises(DamagedDocumentError, match=text):
        source_names(opened.container)


@pytest.mark.parametrize(
    ("kind", "facts", "text"),
    [
        ("document", None, r" is damaged: its header is not valid \("),
        ("document", FACTS.as_json() | {"tokens": -1}, r" is damaged: .* impossible\)"),
        ("conversation", {}, r" is a conversation and not a document\. Name the document"),
    ],
)
def test_a_file_that_is_refused_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, facts: object, text: str
) -> None:
    path = written(tmp_path / "a", facts, kind=kind)
    files: list[Any] = []
    real = container._opened

    def kept(*how: Any) -> Any:
        files.append(real(*how))
        return files[0]

    monkeypatch.setattr(container, "_opened", kept)
    with pytest.raises(SavedDocumentError, match=f"^{re.escape(str(path))}{text}"):
        open_facts(path)
    assert files[0].closed


OWN = "to choose its own while reading"


@pytest.mark.parametrize(
    ("had", "spec", "needing"),
    [
        (None, "h2o", f"h2o with a budget of 16 needs {OWN}."),
        ("h2o", "sketch", "sketch with a budget of 16 needs all keys."),
        ("streaming-llm", "h2o", f"h2o with a budget of 16 needs {OWN}."),
        ("h2o", "h2o:recent_share=0.25", f"needs {OWN}, with another value of recent_share."),
    ],
)
def test_an_error_says_what_a_policy_needs(had: str | None, spec: str, needing: str) -> None:
    kept = None if had is None else Kept(create_policy(had).described(), 16, None)
    facts = Facts(**{**FACTS.__dict__, "kept": kept})
    settings = SimpleNamespace(policy=create_policy(spec), budget=SimpleNamespace(value=16))
    with pytest.raises(SavedDocumentError, match=re.escape(needing)):
        check_policy(Path("a"), facts, cast(SequenceSettings, settings))
