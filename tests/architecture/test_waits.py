"""Whoever waits says for how long: a wait that nothing ends would hold a test run, or a user."""

from __future__ import annotations

import ast
from pathlib import Path

import nearfar

HOUSES = (Path(nearfar.__file__).parent, Path(__file__).parents[1])
WAITS = {"acquire", "communicate", "join", "wait"}
PROCESSES = {"subprocess.run", "subprocess.check_call", "subprocess.check_output"}


def endless(source: str) -> list[int]:
    """Lines of the calls in ``source`` that wait without a limit."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        starts = ast.unparse(node.func) in PROCESSES
        limited = any(keyword.arg in ("timeout", None) for keyword in node.keywords)
        if not limited and (starts or (node.func.attr in WAITS and not node.args)):
            found.append(node.lineno)
    return found


def test_what_is_found() -> None:
    source = "thread.join()\nevent.wait(5)\nsubprocess.run(a)\nsubprocess.run(a, timeout=1)"
    assert endless(source) == [1, 3]


def test_every_wait_has_a_limit() -> None:
    found = [
        f"{path.relative_to(house.parent)}:{line}"
        for house in HOUSES
        for path in sorted(house.rglob("*.py"))
        for line in endless(path.read_text())
    ]
    assert not found, f"these wait without a limit: {found}"
