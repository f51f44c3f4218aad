from __future__ import annotations

import importlib

import pytest

from nearfar import Engine, runtime
from nearfar.runtime.text import text_files


def test_modules_are_found_under_their_old_names() -> None:
    for old, new in runtime._MOVED.items():
        with pytest.warns(DeprecationWarning, match=rf"runtime\.{old} is .*\.{new} now\."):
            module = importlib.import_module(f"nearfar.runtime.{old}")
        assert module is importlib.import_module(f"nearfar.runtime.{new}")
    assert text_files.__spec__ is not None
    assert text_files.__spec__.name == "nearfar.runtime.text.text_files"
    assert importlib.import_module("nearfar.runtime.engine").Engine is Engine
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nearfar.runtime.gone")
