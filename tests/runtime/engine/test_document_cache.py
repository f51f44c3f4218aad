"""The cache of documents: found when nothing changed, and never larger than its limit."""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from saved_cases import NINE, QUESTION, TEXT, tiny_engine
from specs import LSH
from tiny_folder import text_of

from nearfar.errors import InvalidOptionError, SavedDocumentError
from nearfar.runtime.engine import document_cache as module
from nearfar.runtime.engine.document_cache import DocumentCache, document_key
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.saved.layout import VERSION
from nearfar.runtime.saved.writing import write_container
from nearfar.runtime.text.text_files import document_text

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cache(tmp_path: Path) -> DocumentCache:
    return DocumentCache(tmp_path / "documents")


def reads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts documents that ``engine`` or one with its class reads from now on."""
    counted: list[int] = []
    real = Engine.read

    def read(self: Engine, *arguments: Any, **keywords: Any) -> Any:
        counted.append(1)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(Engine, "read", read)
    return counted


def test_a_document_is_read_once(
    base: Engine, cache: DocumentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = reads(base, monkeypatch)
    first = cache.read(base, TEXT)
    again = cache.read(base, f"\n{TEXT}  ")
    assert (first.was_opened, again.was_opened, len(counted)) == (False, True, 1)
    assert again.ask(QUESTION, NINE).token_ids == first.ask(QUESTION, NINE).token_ids
    [entry] = cache.entries()
    assert entry.facts is not None
    assert entry.facts.tokens == first.tokens
    assert cache.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "change",
    [
        {"text": f"{TEXT} more"},
        {"sinks": 5},
        {"window": 9},
        {"far_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"policy": "h2o"},
        {"policy": "h2o", "budget": 17},
        {"policy": "streaming-llm"},
    ],
)
def test_what_a_reading_depends_on_makes_another_key(base: Engine, change: dict[str, Any]) -> None:
    text = change.pop("text", TEXT)
    parts = (base.model, base.tokenizer)
    known = {document_key(*parts, TEXT, base.config)}
    if change.get("budget"):
        known |= {document_key(*parts, TEXT, base.config.replace(policy="h2o"))}
    assert document_key(*parts, text, base.config.replace(**change)) not in known


@pytest.mark.parametrize(
    "change",
    [
        {"policy": LSH},
        {"policy": "full"},
        {"policy": "full-far"},
        {"policy": "sketch:bits=2"},
        {"budget": 99},
        {"seed": 4},
        {"threads": 2},
        {"chunk_tokens": 7},
        {"far_memory_bytes": 10**9},
    ],
)
def test_what_it_does_not_depend_on_finds_the_same(
    base: Engine, cache: DocumentCache, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    cache.read(base, TEXT)
    counted = reads(base, monkeypatch)
    engine = base.with_config(base.config.replace(**change))
    got = cache.read(engine, TEXT).ask(QUESTION, NINE).token_ids
    assert counted == []
    assert got == engine.read(TEXT).ask(QUESTION, NINE).token_ids


def test_an_index_that_was_made_is_kept(base: Engine, cache: DocumentCache) -> None:
    cache.read(base, TEXT)
    tables = base.with_policy(LSH)
    assert cache.read(tables, TEXT).index_is_new
    assert not cache.read(tables, TEXT).index_is_new
    assert not cache.read(base, TEXT).index_is_new


def test_passages_are_named_as_they_are_called_now(base: Engine, cache: DocumentCache) -> None:
    for name in ("one.txt", "elsewhere/two.txt"):
        document = cache.read(base, document_text(TEXT.encode(), name))
        answer = document.ask(QUESTION, NINE, sources=1)
        assert [passage.source for passage in answer.passages] == [name]


def test_a_damaged_file_is_read_again(
    base: Engine, cache: DocumentCache, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = cache.read(base, TEXT).ask(QUESTION, NINE).token_ids
    [path] = cache.folder.iterdir()
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.unlink()
    path.write_bytes(data)
    document = cache.read(base, TEXT)
    assert not document.was_opened
    assert document.ask(QUESTION, NINE).token_ids == wanted
    message = "What was kept of the document cannot be used, it is read again. "
    assert [record.getMessage() for record in caplog.records] == [
        f"{message}{path} is damaged: its header differs. Make it again with: nearfar index"
    ]
    assert cache.read(base, TEXT).was_opened


def test_a_cache_that_cannot_be_written_costs_a_warning(
    base: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    document = DocumentCache(tmp_path / "file").read(base, TEXT)
    assert document.ask(QUESTION, NINE).token_ids == base.read(TEXT).ask(QUESTION, NINE).token_ids
    [record] = caplog.records
    assert record.getMessage().startswith("The document is not kept for the next time. [Errno 17]")


def filled(base: Engine, cache: DocumentCache, count: int) -> list[Path]:
    """Files of the cache, the one used longest ago first."""
    paths = []
    for number in range(count):
        text = text_of(200, seed=number)
        cache.read(base, text)
        path = cache.path(document_key(base.model, base.tokenizer, text, base.config))
        os.utime(path, (1000.0 + number, 1000.0 + number))
        paths.append(path)
    return paths


def test_what_was_used_longest_ago_goes(base: Engine, cache: DocumentCache) -> None:
    paths = filled(base, cache, 4)
    size = paths[0].stat().st_size
    assert cache.read(base, text_of(200, seed=0)).was_opened  # used now
    cache.limit_bytes = int(3.5 * size)
    filled_again = cache.read(base, text_of(200, seed=9))
    assert not filled_again.was_opened
    left = {entry.path for entry in cache.entries()}
    assert left >= {paths[0], paths[3]}
    assert len(left) == 3
    assert sum(path.stat().st_size for path in left) <= cache.limit_bytes


def test_entries_are_in_the_order_of_use(base: Engine, cache: DocumentCache) -> None:
    paths = filled(base, cache, 3)
    assert [entry.path for entry in cache.entries()] == paths[::-1]


def test_pruning(base: Engine, cache: DocumentCache, tmp_path: Path) -> None:
    paths = filled(base, cache, 3)
    broken = cache.folder / f"{'0' * 64}.nearfar"
    broken.write_bytes(b"nothing")
    (cache.folder / f".{paths[0].name}.12345678.partial").write_bytes(b"half")
    (cache.folder / "notes.txt").write_text("not ours")
    cache.limit_bytes = 2 * paths[0].stat().st_size + 100
    assert {path.name for path in cache.prune()} == {broken.name, paths[0].name}
    assert {path.name for path in cache.folder.iterdir()} == {
        "notes.txt",
        paths[1].name,
        paths[2].name,
    }
    assert {path.name for path in cache.clear()} == {paths[1].name, paths[2].name}
    assert (cache.entries(), cache.prune()) == ([], [])
    assert DocumentCache(tmp_path / "none").entries() == []


def test_a_document_above_the_limit_is_not_kept(
    base: Engine, cache: DocumentCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.limit_bytes = 1000
    wanted = base.read(TEXT).ask(QUESTION, NINE).token_ids
    assert cache.read(base, TEXT).ask(QUESTION, NINE).token_ids == wanted
    assert cache.entries() == []
    assert "it is above the limit" in caplog.text


def test_the_cache_takes_no_more_than_half_of_the_room(
    base: Engine, cache: DocumentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = filled(base, cache, 3)
    total = sum(path.stat().st_size for path in paths)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, total // 4))
    assert cache.prune() == paths[:2]


def test_files_are_found_by_the_start_of_their_names(base: Engine, cache: DocumentCache) -> None:
    paths = filled(base, cache, 2)
    assert cache.find(paths[0].name[:12]) == paths[0]
    assert cache.find(str(paths[1])) == paths[1]
    for name, count in (("zzz", "no"), ("", "no")):
        message = re.escape(f"{name!r} names {count} documents. Give a file, or a name that ")
        with pytest.raises(InvalidOptionError, match=f"^{message}"):
            cache.find(name)


def test_the_default_folder_is_in_nearfars_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path))
    assert DocumentCache().folder == tmp_path / "documents"


def test_what_was_just_kept_stays_whatever_the_clock_says(
    base: Engine, cache: DocumentCache
) -> None:
    """Files from a time to come, as after a clock was set back, go before it."""
    paths = filled(base, cache, 3)
    cache.limit_bytes = 2 * paths[0].stat().st_size + 100
    assert cache.prune(keep=paths[0]) == [paths[1]]
    cache.limit_bytes = paths[0].stat().st_size + 100
    assert cache.prune(keep=paths[0]) == [paths[2]]
    assert [entry.path for entry in cache.entries()] == [paths[0]]


def test_a_file_of_a_newer_nearfar_is_kept_and_of_an_older_one_is_useless(
    cache: DocumentCache,
) -> None:
    cache.folder.mkdir()
    for digit, change in (("0", -1), ("1", 1)):
        path = cache.folder / f"{digit * 64}.nearfar"
        write_container(path, {}, [])
        data = bytearray(path.read_bytes())
        data[8:12] = struct.pack("<I", VERSION + change)
        path.unlink()
        path.write_bytes(data)
    useless = {entry.path.name[0]: entry.useless for entry in cache.entries()}
    assert useless == {"0": True, "1": False}


def test_a_file_that_cannot_be_read_now_is_not_useless(tmp_path: Path) -> None:
    error = SavedDocumentError("It cannot be read.")
    assert not module._is_useless(tmp_path / "none", error)
    (tmp_path / "text").write_text("a letter")
    assert module._is_useless(tmp_path / "text", error)


def test_only_what_is_nearfars_own_is_taken_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mode(path: Path) -> int:
        return path.stat().st_mode & 0o777

    cache, file = DocumentCache(tmp_path), tmp_path / "file"
    file.touch()
    tmp_path.chmod(0o755)
    cache._protect(tmp_path)  # a folder that the caller named
    assert mode(tmp_path) == 0o755
    for before, after in ((0o640, 0o600), (0o700, 0o700)):
        file.chmod(before)
        cache._protect(file)
        assert mode(file) == after
    file.chmod(0o644)
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    cache._protect(file)  # another user's
    assert mode(file) == 0o644
