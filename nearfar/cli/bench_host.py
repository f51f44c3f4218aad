"""`nearfar bench host`: the host kernels for one layer, beside the time of memory alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from nearfar.cli.loading import note_threads
from nearfar.cli.options import Settings
from nearfar.cli.output import Output, facts_table, format_seconds

if TYPE_CHECKING:
    from nearfar.evaluation.host_cases import HostSetting
    from nearfar.evaluation.host_speed import HostResult, HostSpeed
    from nearfar.evaluation.speed import Timing

DEFAULT_SHAPE = "llama-3.1-8b"
DEFAULT_CONTEXT = 131_072
DEFAULT_BUDGET = 0.02  # of the keys
DEFAULT_ROUNDS = 20


def run_host(
    shape: str | None, context: int, rounds: int | None, rivals: list[str], settings: Settings
) -> None:
    """Measure and print. ``context`` and the budget count only if the user gave them."""
    from nearfar.evaluation.host_speed import bench_host

    if rivals not in ([], ["faiss"]):
        raise click.UsageError(f"--against of host is faiss. Got {', '.join(rivals)!r}.")
    with Output(settings.as_json) as output:
        note_threads(settings.config.threads, output)
        setting = _setting(shape or DEFAULT_SHAPE, context, rounds, settings)
        output.record({"bench": "host", "shape": shape or DEFAULT_SHAPE})
        output.record(dataclasses.asdict(setting))
        with output.progress("measuring") as report:
            done = 0

            def count(_: HostResult) -> None:
                nonlocal done
                done += 1
                report(done, 0)

            speed = bench_host(setting, count, against_faiss=bool(rivals))
        output.record(dataclasses.asdict(speed))
        output.show(facts_table(_facts(setting, speed), "One layer"))
        output.show(_table(speed))


def _setting(shape: str, context: int, rounds: int | None, settings: Settings) -> HostSetting:
    from nearfar.evaluation.host_cases import HostSetting
    from nearfar.evaluation.shapes import shape_config
    from nearfar.policies.sketch import Sketch
    from nearfar.runtime.memory import hardware
    from nearfar.runtime.memory.sequence_settings import budget_of

    source = click.get_current_context().get_parameter_source
    given = click.core.ParameterSource.COMMANDLINE
    context = context if source("context") == given else DEFAULT_CONTEXT
    budget = settings.config.budget if source("budget") == given else DEFAULT_BUDGET
    geometry = shape_config(shape, context).geometry
    config = settings.config.replace(budget=budget, far_dtype="bfloat16")  # of the rows
    threads = settings.config.threads or hardware.default_threads()
    keys = budget_of(config, geometry, Sketch.traits, 2).keys(context)
    return HostSetting(geometry, context, keys, threads, rounds or DEFAULT_ROUNDS)


def _facts(setting: HostSetting, speed: HostSpeed) -> dict[str, str]:
    geometry, share = setting.geometry, speed.huge_page_share
    return {
        "heads": f"{geometry.query_heads} query, {geometry.kv_heads} KV, "
        f"{geometry.head_dim} dimensions",
        "keys": f"{setting.num_keys:,}, of which {setting.budget:,} are read",
        "rows on huge pages": "not known" if share is None else f"{share:.0%}",
        "threads": _scaling(speed),
        "building tables": _indexing(speed, "tables"),
        "building a sketch of 4 bits": _indexing(speed, "sketch"),
    }


def _scaling(speed: HostSpeed) -> str:
    """The speedup of attention, and of copying, with more threads."""
    from nearfar.evaluation.host_speed import attention_by_threads

    one, *more = attention_by_threads(speed)
    return str(one.threads) + "".join(
        f", {each.threads}: {one.nearfar.median_seconds / each.nearfar.median_seconds:.2f} times "
        f"as fast (copying {one.ceiling.median_seconds / each.ceiling.median_seconds:.2f})"
        for each in more
    )


def _indexing(speed: HostSpeed, name: str) -> str:
    seconds, share = (
        speed.indexing[f"{name}_{what}"] for what in ("seconds", "bytes_by_far_bytes")
    )
    return f"{format_seconds(seconds)}, {share:.2f} of the bytes of bfloat16 keys and values"


def _table(speed: HostSpeed) -> Table:
    title = (
        "\nMilliseconds: median (p20 - p80). Ceiling: copying as many rows from elsewhere, or "
        "reading as many bytes in order. Behind a rival: its time by nearfar's"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    names = ("kernel", "storage", "threads", "ceiling", "nearfar", "ratio", "GB/s", "rivals")
    for name in names:
        table.add_column(name, overflow="fold")
    for result in speed.results:
        table.add_row(*_row(result))
    return table


def _row(result: HostResult) -> tuple[str, ...]:
    recall = {name: f", recall {share:.3f}" for name, share in result.recall.items()}
    rivals = (
        f"{name}: {_ms(timing)}, {result.times_as_fast[name]:.2f} x{recall.get(name, '')}"
        for name, timing in result.rivals.items()
    )
    return (
        result.kernel,
        result.storage,
        str(result.threads),
        f"{result.ceiling_name} {_ms(result.ceiling)}",
        _ms(result.nearfar) + recall.get("nearfar", ""),
        f"{result.ratio:.2f}",
        f"{result.bytes_read / result.nearfar.median_seconds / 1e9:.1f}",
        "; ".join(rivals),
    )


def _ms(timing: Timing) -> str:
    values: tuple[Any, ...] = (timing.median_seconds, timing.p20_seconds, timing.p80_seconds)
    median, p20, p80 = (f"{value * 1e3:.3g}" for value in values)
    return f"{median} ({p20} - {p80})"
