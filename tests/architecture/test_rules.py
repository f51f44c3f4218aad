"""Files, functions and imports keep to their sizes and directions; each exemption says why."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import nearfar

ROOT = Path(nearfar.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 300, 40, 6
KERNELS = ("cpu_kernels", "gpu_kernels")  # a kernel is one loop over many arrays
MOST_FILES_OF_A_ROOM = 21  # of rooms within the runtime, __init__.py included
MOST_METHODS = {"Engine": 15, "TokenEngine": 15, "Sequence": 15}


def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8")) for path in FILES}


def is_command(function: ast.FunctionDef) -> bool:
    """Whether a function is a command of the CLI: its parameters are the command's options."""
    return any("command(" in ast.unparse(each) for each in function.decorator_list)


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def wrong_functions(name: str, tree: ast.AST) -> list[str]:
    """Functions of a file that are too long or take too much."""
    wrong = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or is_command(function):
            continue
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > MOST_FUNCTION_LINES:
            wrong.append(f"{name}: {function.name} has {lines} lines")
        if len(parameters(function)) > MOST_PARAMETERS:
            wrong.append(f"{name}: {function.name} has {len(parameters(function))} parameters")
    return wrong


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules among ``known`` that a file imports, also those that only type checkers read."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & known


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves."""
    reached = {name: set(others) for name, others in graph.items()}
    for middle, first in itertools.product(graph, graph):
        if middle in reached[first]:
            reached[first] |= reached[middle]
    return sorted(name for name in graph if name in reached[name])


def test_files_are_short() -> None:
    lines = {path: path.read_text("utf-8").count("\n") for path in FILES}
    assert {str(path): n for path, n in lines.items() if n > MOST_FILE_LINES} == {}


def test_functions_are_short_and_take_few_parameters() -> None:
    found = trees().items()
    wrong = [each for name, tree in found for each in wrong_functions(name, tree)]
    assert [each for each in wrong if not each.startswith(KERNELS)] == []


def test_rooms_of_the_runtime_are_not_crowded() -> None:
    rooms = [path for path in (ROOT / "runtime").iterdir() if (path / "__init__.py").exists()]
    assert len(rooms) == 7
    crowded = {room.name: len(list(room.glob("*.py"))) for room in rooms}
    assert {name: n for name, n in crowded.items() if n > MOST_FILES_OF_A_ROOM} == {}


def test_large_classes_stay_within_their_methods() -> None:
    methods = {
        node.name: sum(isinstance(each, ast.FunctionDef) for each in node.body)
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name in MOST_METHODS
    }
    assert methods.keys() == MOST_METHODS.keys()
    assert {name: n for name, n in methods.items() if n > MOST_METHODS[name]} == {}


def test_nothing_imports_itself_in_a_circle() -> None:
    names = {
        path: ".".join(("nearfar", *path.relative_to(ROOT).with_suffix("").parts)) for path in FILES
    }
    known = set(names.values())
    graph = {names[ROOT / name]: imported(tree, known) for name, tree in trees().items()}
    assert circles(graph) == []


def test_what_breaks_a_rule_is_found() -> None:
    long = "def f(a, b, c, d, e, g, h):\n" + "    pass\n" * 40
    assert wrong_functions("x.py", ast.parse(long)) == [
        "x.py: f has 41 lines",
        "x.py: f has 7 parameters",
    ]
    assert wrong_functions("x.py", ast.parse(f"@click.command()\n{long}")) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c"]
    tree = ast.parse("if TYPE_CHECKING:\n    from nearfar.a import b")
    assert imported(tree, {"nearfar.a.b"}) == {"nearfar.a.b"}
