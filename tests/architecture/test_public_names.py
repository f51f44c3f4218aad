"""The public surface is what it says, typed and documented, and loading it costs nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys

from limits import LIMIT_SECONDS

import nearfar
from nearfar.runtime.engine.token_engine import TokenEngine

PUBLIC = [
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
ENGINE = {
    "from_prepared",
    "from_pretrained",
    "generate",
    "memory_report",
    "open",
    "random",
    "read",
    "stream",
    "with_config",
    "with_policy",
}
TOKEN_ENGINE = {
    "adopt",
    "check_ids",
    "check_memory",
    "model",
    "new_run",
    "new_sequence",
    "pieces",
    "plan",
    "read_ids",
    "report_of",
    "settings",
    "step",
    "tokenizer",
    "traced_step",
}
DOCUMENT = {
    "hands",
    "conversation",
    "ask",
    "extend",
    "index_is_new",
    "name_sources",
    "memory_report",
    "prefill_seconds",
    "save",
    "sequence",
    "stream",
    "tokens",
    "was_opened",
    "write",
}


def public_members(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


def test_public_names_are_pinned() -> None:
    assert nearfar.__all__ == PUBLIC
    for name in PUBLIC:
        assert inspect.getdoc(getattr(nearfar, name)), f"{name} has no docstring"


def test_members_are_pinned_documented_and_typed() -> None:
    classes = ((nearfar.Engine, ENGINE), (TokenEngine, TOKEN_ENGINE), (nearfar.Document, DOCUMENT))
    for cls, members in classes:
        assert public_members(cls) == members
        for name in public_members(cls):
            member = inspect.getattr_static(cls, name)
            function = getattr(member, "__func__", getattr(member, "fget", member))
            assert inspect.getdoc(function), f"{cls.__name__}.{name} has no docstring"
            signature = inspect.signature(function)
            assert signature.return_annotation is not inspect.Signature.empty, name


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, nearfar, nearfar.cli.main; print([m for m in sys.modules if m in heavy])"
    heavy = "heavy = ('torch', 'numba', 'numpy', 'transformers'); "
    done = subprocess.run(
        [sys.executable, "-c", heavy + code],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.stdout.strip() == "[]"
