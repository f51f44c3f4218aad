"""Imports go down only, rooms on one line do not import each other, modules stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nearfar

ROOT = Path(nearfar.__file__).parent
FLOORS = [
    {"cli"},
    {"evaluation"},
    {"runtime"},
    {"policies"},
    {"lsh"},
    {"gpu_kernels", "cpu_kernels"},
    {"config", "records"},
    {"storage"},
    {"packing"},
    {"errors"},
]
# start-up time, lazy factories, and libraries that take seconds to import and are rarely used
MAY_IMPORT_INSIDE_FUNCTIONS = {
    "cli",
    "policies.registry",
    "evaluation.host_select",
    "evaluation.timeline_files",
    "policies.faiss_search",
    "policies.sketch",
    "runtime.hub",
    "runtime.near_kernels",
    "runtime.stepping",
    "runtime.tokenizer_conversion",
}
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, at module level) of every import that runs."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, top))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(tree, True)
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    name = module_name(path)
    room = name.split(".")[0]
    if room in ("__init__", "__main__"):
        return
    for module, top in imports(ast.parse(path.read_text())):
        if not top:
            allowed = name.startswith(tuple(MAY_IMPORT_INSIDE_FUNCTIONS))
            assert allowed, f"{name} imports {module} inside a function"
        if not module.startswith("nearfar."):
            continue
        other = module.split(".")[1]
        if other != room:
            assert floor(room) < floor(other), f"{name} imports {module}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_modules_say_what_they_are_and_stay_small(path: Path) -> None:
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
    assert source.count("\n") <= 400, f"{path} has outgrown one idea"
