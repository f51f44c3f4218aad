"""Documents cannot rot: files, functions, commands and links that they name exist.

A file is named by the end of its path (`runtime/decode.py`), what is in it after a colon
(`runtime/decode.py:decode_step`), or both with dots (`nearfar.config`). docs/log.md is left out: it
speaks of what was.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest

import nearfar
from nearfar.cli.main import COMMANDS, cli
from nearfar.policies.registry import BUILT_IN, policy_class

ROOT = Path(nearfar.__file__).parents[1]
HISTORY = ROOT / "docs" / "log.md"
DOCUMENTS = [
    path
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))
    if path != HISTORY
]
FOLDERS = ("nearfar", "tests", "benchmarks", "training", "examples", "docs")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
FILE = re.compile(r"(?<![\w./<>*-])(\w[\w./-]*\.py)\b(?::([A-Za-z_][\w.]*))?")
MODULE = re.compile(r"(?<![\w./-])nearfar(?:[.:]\w+)+")
LINK = re.compile(r"\[[^]]+\]\(([^)\s]+)\)")
URL = re.compile(r"https?://\S+")

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@cache
def names_in(path: Path) -> frozenset[str]:
    """Names that a file defines, those of its classes as Class.name."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            found.update(prefix + each.id for each in targets if isinstance(each, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def wrong_files(text: str) -> list[str]:
    """References to files, or to names in them, that do not exist."""
    wrong = []
    for match in FILE.finditer(URL.sub("", text)):
        path, name = match.groups()
        named = [file for file in FILES if f"/{file.relative_to(ROOT)}".endswith(f"/{path}")]
        if not any(name is None or name.rstrip(".") in names_in(file) for file in named):
            wrong.append(match.group())
    return wrong


def exists(reference: str) -> bool:
    """Whether dots (and a colon) lead to a module of the package or to something in it."""
    thing: object = nearfar
    parts = re.split("[.:]", reference)
    for depth, part in enumerate(parts[1:], start=2):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            try:
                thing = importlib.import_module(".".join(parts[:depth]))
            except ImportError:
                return part in getattr(thing, "__dataclass_fields__", {})
    return True


def wrong_modules(text: str) -> list[str]:
    """References with dots that lead nowhere."""
    return [found for found in MODULE.findall(URL.sub("", text)) if not exists(found)]


def wrong_commands(text: str) -> list[str]:
    """Lines of code that call nearfar with a command or an option that it does not have."""
    wrong = []
    for block in re.findall(r"^```(?:bash|sh|console|text)?\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("nearfar "):
                words = shlex.split(re.split(r" [|>&#]", line)[0])[1:]
                wrong += [line] if not is_command(words) else []
    return wrong


def is_command(words: list[str]) -> bool:
    """Whether ``words`` are a command of nearfar and options that it has."""
    command: click.Command = cli
    if words[0] in COMMANDS:
        found = cli.get_command(click.Context(cli), words[0])
        assert found is not None
        command = found
    elif not words[0].startswith("-"):
        return False
    if isinstance(command, click.Group) and command is not cli:
        command = command.commands.get(words[1], command.commands["page"])
    known = {"-h", "--help", *(name for param in command.params for name in param.opts)}
    given = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    return given <= known


def anchors(path: Path) -> set[str]:
    """Anchors that a page's headings get."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@every_document
def test_files_and_what_is_in_them_exist(document: Path) -> None:
    assert wrong_files(document.read_text(encoding="utf-8")) == []


@every_document
def test_modules_exist(document: Path) -> None:
    assert wrong_modules(document.read_text(encoding="utf-8")) == []


@every_document
def test_commands_and_their_options_exist(document: Path) -> None:
    assert wrong_commands(document.read_text(encoding="utf-8")) == []


@every_document
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    text = document.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^ +|`|^\$ )make ([a-z]+)", text, re.M)) <= targets


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        page, _, anchor = link.partition("#")
        target = (document.parent / page).resolve() if page else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_policy_has_a_section_with_its_parameters(name: str) -> None:
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    assert f"\n## {name}\n" in page, f"docs/policies.md has no section '## {name}'"
    section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
    section = section.partition("<!-- rows of")[0]  # what was measured is no parameter
    fields = {field.name: field.default for field in dataclasses.fields(policy_class(name))}
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S*) ?\|", section, re.M))
    assert rows == {field: str(default) for field, default in fields.items()}
    for part in ("Source:", "Use it", "Not "):
        assert part in section


def test_what_does_not_exist_is_found() -> None:
    """The checks above can fail."""
    assert wrong_files("`steps/decode.py:decode_step`, `tests/<room>/test_<module>.py`") == []
    assert wrong_files("see https://example.org/a/b.py") == []
    bad = "`steps/decode.py:decode_stop` and `runtime/gone.py` and `sequence.py:Sequence.gone`"
    assert len(wrong_files(bad)) == 3
    assert wrong_modules("nearfar.config:EngineConfig.replace nearfar.errors.ModelError") == []
    assert len(wrong_modules("`nearfar.gone` `nearfar.config:Gone` `nearfar.Engine.gone`")) == 3
    good = "```\nnearfar qa a.txt -q 'What - now?' --budget 3 | jq .\n```\n"
    assert wrong_commands(good) == []
    assert len(wrong_commands("```\n$ nearfar qa a.txt \\\n --gone\nnearfar gone\n```\n")) == 2
