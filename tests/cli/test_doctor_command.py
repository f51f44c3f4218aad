from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_engine import nearfar

from nearfar.runtime.memory import hardware


def test_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights").write_bytes(b"x" * 1000)
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path))
    result = nearfar("doctor", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    cache = record["caches"]["nearfar"]
    assert cache == {"path": str(tmp_path), "exists": True, "bytes": 1000, "writable": True}
    assert record["machine"]["physical_cores"] == hardware.physical_cores()
    assert record["machine"]["available_memory_bytes"] <= record["machine"]["memory_bytes"]
    assert record["choices"]["threads"]["value"] == str(hardware.default_threads())
    assert set(record["choices"]) == {"device", "dtype", "threads"}
    assert {"python", "torch", "numba", "cuda"} <= set(record["versions"])


def test_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "new"))
    text = nearfar("doctor").stdout
    for part in ("Machine", "What would be used", "Caches", "Versions", "SIMD", "huge pages"):
        assert part in text
    assert f"{tmp_path / 'new'}: not there yet" in text
    assert not (tmp_path / "new").exists()


def test_a_cache_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "file"))
    assert "NOT WRITABLE" in nearfar("doctor").stdout
