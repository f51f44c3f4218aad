from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from nearfar.cli.main import COMMANDS

MAKER = Path(__file__).parents[2] / "docs" / "make_cli.py"


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", MAKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_help_says() -> None:
    make_cli = maker()
    if make_cli.PAGE.read_text(encoding="utf-8") != make_cli.render():
        pytest.fail("docs/cli.md is stale. Run: python docs/make_cli.py", pytrace=False)


def test_every_command_has_a_section() -> None:
    page = maker().render()
    assert [f"## nearfar {name}\n" in page for name in COMMANDS] == [True] * len(COMMANDS)
    assert page.count("Usage: nearfar") == len(COMMANDS) + 1 + 2  # and those of report


def test_width_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    for columns in ("40", "250"):
        monkeypatch.setenv("COLUMNS", columns)
        pages.append(maker().render())
    assert pages[0] == pages[1]
