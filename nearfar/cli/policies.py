"""`nearfar policies`: the registered policies and their needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from nearfar.cli.options import debug_option, json_option
from nearfar.cli.output import Output

_WATCHED = {
    "sums": "attention of the whole prompt",
    "last": "the prompt's last queries",
    "moments": "mean and covariance of the prompt's queries",
}


@click.command()
@json_option
@debug_option
def policies(as_json: bool) -> None:
    """List the policies: the keys that they keep and read, and their needs.

    A parameter is set with --policy NAME:PARAMETER=VALUE.
    """
    from nearfar.policies.registry import policy_names

    with Output(as_json) as output:
        records = [_describe(name) for name in policy_names()]
        output.record({"policies": records})
        output.show(_table(records))


def _describe(name: str) -> dict[str, Any]:
    from nearfar.policies.registry import policy_class

    try:
        cls = policy_class(name)
    except Exception as error:  # one broken package does not hide the other policies
        return {"name": name, "error": f"{type(error).__name__}: {error}"}
    traits = dataclasses.asdict(cls.traits)
    parameters = {field.name: field.default for field in dataclasses.fields(cls)}
    record = {"name": name, **traits, "requires": cls.requires, "parameters": parameters}
    return {**record, "error": None}


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table(pad_edge=False)
    table.add_column("policy", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for column in ("what it does", "needs", "parameters", "source"):
        table.add_column(column, overflow="fold")
    for record in records:
        if record["error"]:
            table.add_row(record["name"], "", f"cannot be loaded: {record['error']}")
            continue
        parameters = ", ".join(f"{key}={value}" for key, value in record["parameters"].items())
        table.add_row(
            record["name"],
            "evicts once" if record["evicts_once"] else record["kind"],
            record["summary"],
            _needs(record),
            parameters or "none",
            record["source"],
        )
    return table


def _needs(record: dict[str, Any]) -> str:
    needs = ["far memory"] if record["keeps_far"] else []
    needs += ["attention scores"] if record["needs_attention"] else []
    needs += [_WATCHED[record["watches"]]] if record["watches"] in _WATCHED else []
    needs += [escape(record["requires"][1])] if record["requires"] else []
    return ", ".join([*needs, f"{record['positions']} positions"])
