"""Numbers and lists that documents give are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import MagicMock

import click
import pytest
import test_layers
import test_rules
from docs_scripts import docs_script
from running import command

import nearfar
from nearfar.cli.main import COMMANDS, cli
from nearfar.config import GIB
from nearfar.evaluation.tasks.registry import RULER_NAMES
from nearfar.policies.registry import BUILT_IN, policy_class
from nearfar.records import Geometry
from nearfar.runtime.checkpoints import builtin
from nearfar.runtime.saved import layout
from nearfar.storage import FORMATS, row_width

ROOT = Path(nearfar.__file__).parents[1]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_floors_are_those_that_imports_go_down(name: str) -> None:
    pattern = r"^    (cli > .*)\n +(> .*)\n    within runtime: (.*)$"
    [(first, second, within)] = re.findall(pattern, page(name), re.M)
    for line, floors in (
        (f"{first} {second}", test_layers.FLOORS),
        (within, test_layers.RUNTIME_FLOORS),
    ):
        assert [set(re.split(r" \| |, ", floor)) for floor in line.split(" > ")] == floors


def test_the_longest_file_is_as_contributing_says() -> None:
    [limit] = re.findall(r"a test refuses more\s+than (\d+)", page("CONTRIBUTING.md"))
    assert int(limit) == test_rules.MOST_FILE_LINES


def kind_of(name: str) -> str:
    """What a policy does, as the tables of README.md and docs/policies.md call it."""
    traits = policy_class(name).traits
    return traits.kind + (" once" if traits.evicts_once else "")


def test_the_readme_links_every_policy_once_under_its_kind() -> None:
    table = page("README.md").partition("| kind | policies |")[2].partition("\n\n")[0]
    kinds: list[tuple[str, str]] = []
    kind = ""
    for row in table.splitlines()[2:]:
        kind = row.split("|")[1].strip() or kind
        links = re.findall(r"\[([\w-]+)\]\(docs/policies\.md#([\w-]+)\)", row)
        assert all(name == anchor for name, anchor in links)
        kinds += [(name, kind) for name, _ in links]
    assert sorted(kinds) == sorted((name, kind_of(name)) for name in BUILT_IN)
    assert f"All {len(BUILT_IN)} policies" in page("docs/performance.md")


def test_the_readme_is_short() -> None:
    lines = page("README.md").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


def test_the_readme_shows_what_fits_a_card_as_planned() -> None:
    make_fits, text = docs_script("make_fits"), page("README.md")
    assert make_fits.table().count("\n") == 2 + len(make_fits.ROWS)
    assert make_fits.START + make_fits.table() + make_fits.END in text
    [size] = re.findall(r"The KV cache of Llama-3.1-8B takes \*\*(\d+) GiB\*\*", text)
    assert int(size) * GIB == make_fits.plan("llama-3.1-8b", "full", 131_072).near_kv_bytes


def test_policies_are_of_the_kind_that_their_table_says() -> None:
    rows = re.findall(
        r"^\| \[([\w-]+)\]\(#[\w-]+\) \| ([a-z ]+) \|", page("docs/policies.md"), re.M
    )
    assert dict(rows) == {name: kind_of(name) for name in BUILT_IN}


def test_the_tasks_of_ruler_are_those_that_are_there() -> None:
    text = page("docs/comparing.md").partition("are `niah_single_1`")
    names = re.findall(r"`(\w+)`", "`niah_single_1`" + text[2].partition(", generated here")[0])
    assert tuple(names) == RULER_NAMES
    assert "RULER's thirteen" in text[0]
    assert len(names) == 13


def test_the_download_has_its_size() -> None:
    [size] = {model.base.size_bytes for model in builtin.BUILT_IN.values()}
    for name in ("README.md", "docs/models.md"):
        sizes = re.findall(r"base\s+weights[^.]*?\b([\d.,]+ Mi?B)", page(name))
        assert sizes == [f"{size / 1e6:.0f} MB"], name


def test_rows_take_the_bytes_of_the_table_of_formats() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \| [^|]+ \| (\d+) \| ([\d.]+) \|", page("docs/storage.md"), re.M
    )
    held = {name: row_width(dtype, 64) * dtype.itemsize for name, dtype in FORMATS.items()}
    assert {name: int(size) for name, size, _ in rows} == held
    for name, _, share in rows:
        assert float(share) == round(held[name] / held["bfloat16"], 2)


def test_the_index_of_a_key_takes_the_bytes_that_are_told() -> None:
    text = re.sub(r"\s+", " ", page("docs/policies.md"))
    geometry = Geometry(layers=1, query_heads=1, kv_heads=1, head_dim=128)
    for name, told in (
        ("sketch", r"At 4 bits and D = 128 a key's index takes (\d+) bytes"),
        ("lsh-tables", r"at the default a key's index takes (\d+) bytes"),
    ):
        [size] = re.findall(told, text)
        sizes = [policy_class(name)().predict_index_bytes(geometry, n) for n in (10**6, 2 * 10**6)]
        # scratch, and the starts of tables, come on top
        assert int(size) <= (sizes[1] - sizes[0]) / 10**6 < 1.25 * int(size), name


def test_the_head_of_a_saved_file_lies_as_the_format_says() -> None:
    text = page("docs/format.md")
    ends = [int(end) for end in re.findall(r"^\| \d+ - (\d+) \|", text, re.M)]
    assert ends == [8, 12, 16, 24, 28, layout.PRELUDE.size, layout.HEADER_AT]
    assert f"format version, {layout.VERSION} |" in text
    assert f"at most {layout.MAX_HEADER_BYTES // 2**20} MiB" in text
    assert f'"align": {layout.ALIGN}' in text
    assert f"a checksum for every {layout.BLOCK_BYTES // 2**10} KiB" in text


def commands(group: click.Group) -> list[click.Command]:
    found = [group.get_command(click.Context(group), name) for name in COMMANDS]
    each = [command for command in found if command is not None]
    assert len(each) == len(COMMANDS)
    inner = [list(c.commands.values()) if isinstance(c, click.Group) else [c] for c in each]
    return [command for group in inner for command in group]


def test_every_command_takes_json() -> None:
    assert "Every command takes `--json`" in page("docs/cli.md")
    for each in commands(cli):
        options = {name for parameter in each.params for name in parameter.opts}
        assert "--json" in options, each.name


def test_training_has_the_defaults_of_its_table() -> None:
    made = command("less", (MagicMock(), MagicMock()))
    defaults = {option.opts[0]: option.default for option in made.params}
    rows = re.findall(r"^\| (`--[^|]*) \|([^|]*)\|", page("docs/training.md"), re.M)
    told: dict[str, str] = {}
    for names, values in rows:
        told |= dict(zip(re.findall(r"--[\w-]+", names), values.strip().split(", "), strict=True))
    assert told.pop("--text") == ""
    assert len(told) == 9
    for name, value in told.items():
        default = defaults[name]
        assert value == (f"{default:,g}" if isinstance(default, int | float) else default), name
