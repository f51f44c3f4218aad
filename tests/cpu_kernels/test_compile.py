"""Kernels compile once on a machine, say so, and never fail for want of a place to keep them."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_SECONDS
from numba.core.caching import FunctionCache

import nearfar
from nearfar.cpu_kernels import compile as compiling

NOTICE = "Compiling kernels for this CPU, once on this machine; it takes some seconds."
USE = "from nearfar.cpu_kernels.bits import lowest_bit; print(lowest_bit(40))"


def use_a_kernel(cache: Path) -> subprocess.CompletedProcess[str]:
    root = Path(nearfar.__file__).parents[1]
    environment = os.environ | {"NEARFAR_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", USE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )


@pytest.mark.slow
def test_the_first_process_says_that_it_compiles_and_the_second_need_not(tmp_path: Path) -> None:
    first = use_a_kernel(tmp_path)
    assert first.stdout == "3\n"
    assert first.stderr == NOTICE + "\n"
    assert list(tmp_path.glob("kernels/*/*/bits.lowest_bit*.nbi"))
    second = use_a_kernel(tmp_path)
    assert second.stdout == "3\n"
    assert second.stderr == ""


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_costs_a_compilation_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = use_a_kernel(tmp_path / "file")
    assert done.stdout == "3\n"


def test_a_folder_that_cannot_be_written_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path))
    assert compiling.cache_directory() is not None
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind every tester
    assert compiling.cache_directory() is None


def add_one(x: Any) -> Any:
    return x + 1


def test_a_full_disk_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FunctionCache, "load_overload", lambda *_: None)  # of an earlier run
    monkeypatch.setattr(FunctionCache, "save_overload", full)
    with caplog.at_level(logging.WARNING):
        assert compiling.serial(add_one)(2) == 3
    assert "cannot be kept" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_damaged_cache_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*arguments: Any) -> None:
        raise EOFError

    monkeypatch.setattr(FunctionCache, "load_overload", damaged)
    assert compiling.serial(add_one)(3) == 4


def test_the_folder_follows_the_sources_and_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "compile.py"))
    folders = []
    for source in ("one", "two", "one"):
        (tmp_path / "kernel.py").write_text(source)
        folder = compiling.cache_directory()
        assert folder is not None
        assert folder.is_dir()
        folders.append(folder)
    assert folders[0] == folders[2] != folders[1]
    long_ago = time.time() - compiling.KEEP_SECONDS - 60
    os.utime(folders[1], (long_ago, long_ago))
    (tmp_path / "kernel.py").write_text("three")
    compiling.cache_directory()
    assert folders[0].exists()
    assert not folders[1].exists()
