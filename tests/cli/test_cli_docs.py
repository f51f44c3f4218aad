from __future__ import annotations

import pytest
from docs_scripts import docs_script

from nearfar.cli.main import COMMANDS


def test_the_page_is_what_help_says() -> None:
    make_cli = docs_script("make_cli")
    if make_cli.PAGE.read_text(encoding="utf-8") != make_cli.render():
        pytest.fail("docs/cli.md is stale. Run: python docs/make_cli.py", pytrace=False)


def test_every_command_has_a_section() -> None:
    page = docs_script("make_cli").render()
    assert [f"## nearfar {name}\n" in page for name in COMMANDS] == [True] * len(COMMANDS)
    assert page.count("Usage: nearfar") == len(COMMANDS) + 1 + 2  # and those of report


def test_width_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    for columns in ("40", "250"):
        monkeypatch.setenv("COLUMNS", columns)
        pages.append(docs_script("make_cli").render())
    assert pages[0] == pages[1]
