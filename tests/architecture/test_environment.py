"""docs/environment.md has the environment variables that the code reads, and no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nearfar

ROOT = Path(nearfar.__file__).parents[1]
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
FOLDERS = ("nearfar", "tests", "benchmarks", "training")
OWN = re.compile(r"NEARFAR_[A-Z_]+")
FOR_LIBRARIES_OF_TESTS = {
    "MPLCONFIGDIR"
}  # tests/conftest.py keeps matplotlib out of the home folder


def variables(source: str) -> set[str]:
    """Names that ``source`` looks up in os.environ, by index or by a method."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript):
            owner, keys = node.value, [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, keys = node.func.value, node.args[:1]
            if ast.unparse(node.func) == "os.getenv":
                owner = ast.parse("os.environ", mode="eval").body
        else:
            continue
        if ast.unparse(owner) == "os.environ":
            found |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


def read_in(folder: str) -> set[str]:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py")]
    return {name for source in sources for name in variables(source)}


def test_what_is_read_is_found() -> None:
    source = 'os.environ["A"]; os.environ.get("B", "1"); os.environ.setdefault("C", "")'
    assert variables(source + '\nos.getenv("D"); os.environ | {"E": "1"}; other["F"]') == set(
        "ABCD"
    )


def test_the_page_has_every_variable_that_is_read() -> None:
    read = set().union(*(read_in(folder) for folder in FOLDERS))
    read -= FOR_LIBRARIES_OF_TESTS | {"STARTED"}  # which a benchmark hands to its own child
    assert {name for name in read if f"`{name}`" not in PAGE} == set()


def test_the_page_has_no_variable_that_is_gone() -> None:
    read = {name for folder in FOLDERS for name in read_in(folder) if OWN.fullmatch(name)}
    assert len(read) >= 5
    assert set(OWN.findall(PAGE)) == read
