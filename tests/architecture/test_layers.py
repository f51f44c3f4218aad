"""Imports go down only, and rooms on one line do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import nearfar

ROOT = Path(nearfar.__file__).parent
FLOORS = [
    {"cli"},
    {"evaluation"},
    {"runtime"},
    {"policies"},
    {"lsh"},
    {"gpu_kernels", "cpu_kernels"},
    {"output"},
    {"results"},
    {"config", "records"},
    {"storage"},
    {"packing", "named", "progress"},
    {"errors"},
]
RUNTIME_FLOORS = [
    {"engine"},
    {"steps", "saved", "checkpoints"},
    {"memory"},
    {"models", "text"},
]
MAY_IMPORT_INSIDE_FUNCTIONS = {
    "cli": "a command imports what it needs, so that --help is there at once",
    "__init__": "importing the package imports no torch",
    "evaluation.host_select": "faiss is optional",
    "evaluation.timeline_files": "matplotlib is optional",
    "policies.faiss_search": "faiss is optional",
    "policies.sketch": "kernels of a GPU need Triton, which a CPU does not",
    "runtime.checkpoints.hub": "huggingface_hub takes a second to import and is rarely used",
    "runtime.checkpoints.slow_tokenizer": "transformers is optional",
    "runtime.models.decoder": "kernels of a GPU need Triton",
    "runtime.models.linear": "kernels of a GPU need Triton",
    "runtime.steps.gpu_prefill": "kernels of a GPU need Triton",
    "runtime.steps.stepping": "kernels of a GPU need Triton",
}
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_below(module: str, other: str) -> bool:
    """Whether ``other`` is in the room of ``module`` or in one below; names within the package."""
    for floors in (FLOORS, RUNTIME_FLOORS):
        (room, _, module), (other_room, _, other) = module.partition("."), other.partition(".")
        if room != other_room:
            number = {name: i for i, rooms in enumerate(floors) for name in rooms}
            return number[room] < number[other_room]
        if room != "runtime":
            break
    return True


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


def wrong_imports(name: str, tree: ast.AST) -> list[str]:
    """What is wrong with the imports of a module."""
    found: list[str] = []
    if name in ("__init__", "__main__"):
        return []
    for module, top in imports(tree):
        if not top and not name.startswith(tuple(MAY_IMPORT_INSIDE_FUNCTIONS)):
            found.append(f"{name} imports {module} inside a function")
        if not module.startswith("nearfar."):
            continue
        if not is_below(name, module.removeprefix("nearfar.")):
            found.append(f"{name} imports {module}, which is not below it")
    return found


def test_imports_go_down() -> None:
    trees = {module_name(path): ast.parse(path.read_text()) for path in FILES}
    assert len(trees) == len(FILES) > 200
    assert not [wrong for name, tree in trees.items() for wrong in wrong_imports(name, tree)]


def test_wrong_imports_are_found() -> None:
    upwards = ast.parse(
        "from nearfar.runtime.engine.engine import Engine\nfrom nearfar import errors"
    )
    assert wrong_imports("lsh.tables", upwards) == [
        "lsh.tables imports nearfar.runtime.engine.engine, which is not below it"
    ]
    within = ast.parse("from nearfar.runtime.engine.engine import Engine")
    assert len(wrong_imports("runtime.memory.sequence", within)) == 1
    assert wrong_imports("runtime.engine.document", within) == []
    inside = ast.parse("def f():\n    import torch")
    assert wrong_imports("lsh.tables", inside) == ["lsh.tables imports torch inside a function"]


def test_modules_say_what_they_are() -> None:
    sources = {path: path.read_text() for path in FILES}
    unsaid = [path for path, text in sources.items() if not ast.get_docstring(ast.parse(text))]
    assert not unsaid, "these have no docstring"


def test_every_exemption_is_needed() -> None:
    inside = {
        name
        for path in FILES
        for name in MAY_IMPORT_INSIDE_FUNCTIONS
        if module_name(path).startswith(name)
        if any(not top for _, top in imports(ast.parse(path.read_text())))
    }
    assert inside == MAY_IMPORT_INSIDE_FUNCTIONS.keys()
