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
JSON object and nothing else. Where a command fails, stdout has no such object and stderr says why,
in the line that begins with `Error:`.

| exit code | what it says | such as |
| --- | --- | --- |
| 0 | done | |
| 1 | what was named cannot be used, or not done | a damaged file, a file of another kind, a model \
that is not supported or does not fit memory, a download that fails |
| 2 | the command line cannot be used | an unknown option, policy or model; a value outside its \
rule; a document, saved document, result file or model that is not there or may not be opened; an \
output that cannot be written or may not be replaced |
| 128 and a signal's number | ended by a signal | 130 interrupted, 143 terminated |
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
