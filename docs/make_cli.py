"""Writes docs/cli.md from the help of every command: `python docs/make_cli.py`."""

from __future__ import annotations

from pathlib import Path

import click

from nearfar.cli.main import cli

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100  # columns, whatever the terminal

OPENING = """\
# Command line

`python docs/make_cli.py` makes this page from `--help`; edit the help, not the page.

Results go to stdout, notes and progress to stderr. Every command takes `--json`: stdout is then one
JSON object and nothing else. Exit codes: 0 done, 1 an error, 2 a command line that cannot be used,
130 interrupted.
"""


def render() -> str:
    """The whole page."""
    root = click.Context(cli, info_name="nearfar", terminal_width=WIDTH, **cli.context_settings)
    sections = [OPENING, _section(root)]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, parent=root, info_name=name)
        sections.append(_section(context))
        if isinstance(command, click.Group):
            for part, own in command.commands.items():
                sections.append(_section(click.Context(own, parent=context, info_name=part)))
    return "\n".join(sections)


def _section(context: click.Context) -> str:
    return f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
