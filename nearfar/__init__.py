"""Long-context LLM inference on a GPU that is too small for the KV cache.

Names are loaded when they are first used, so importing the package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearfar.config import EngineConfig, SamplingConfig
    from nearfar.policies.registry import create_policy, policy_names
    from nearfar.results import Answer, Generation, MemoryReport
    from nearfar.runtime.engine.document import Document
    from nearfar.runtime.engine.engine import Engine
    from nearfar.runtime.text.text_files import read_document

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Document",
    "Engine",
    "EngineConfig",
    "Generation",
    "MemoryReport",
    "SamplingConfig",
    "create_policy",
    "policy_names",
    "read_document",
]

_HOMES = {
    "Answer": "nearfar.results",
    "Document": "nearfar.runtime.engine.document",
    "Engine": "nearfar.runtime.engine.engine",
    "EngineConfig": "nearfar.config",
    "Generation": "nearfar.results",
    "MemoryReport": "nearfar.results",
    "SamplingConfig": "nearfar.config",
    "create_policy": "nearfar.policies.registry",
    "policy_names": "nearfar.policies.registry",
    "read_document": "nearfar.runtime.text.text_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nearfar' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
