"""What people use: a loaded model, documents, conversations, answers, and the memory plan."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """`Engine`, which was here before this was a room."""
    if name == "Engine":
        return import_module("nearfar.runtime.engine.engine").Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
