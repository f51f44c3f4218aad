"""Whoever compares numbers says how far they may be apart: no comparison has a library's default.

Defaults follow the type of what is compared. A float32 result that was widened for the comparison
is then held to the rounding of float64, which it meets on the CPU it was written on and no other.
"""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]
COMPARISONS = {"assert_close", "assert_allclose", "allclose"}


def without_tolerance(source: str) -> list[int]:
    """Lines of the comparisons in ``source`` that name no tolerance."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in COMPARISONS
        and not {"rtol", "atol", None} & {keyword.arg for keyword in node.keywords}
    ]


def test_what_is_found() -> None:
    source = "np.allclose(a, b)\nt.assert_close(\n    a, b, rtol=0, atol=0)\nt.assert_close(a, **c)"
    assert without_tolerance(source) == [1]


def test_every_comparison_states_its_tolerance() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{line}"
        for path in sorted(TESTS.rglob("*.py"))
        for line in without_tolerance(path.read_text())
    ]
    assert not found, f"these have a library's default: {found}"
