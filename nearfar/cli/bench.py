"""`nearfar bench`: the ceiling of this machine, then the speed of nearfar and others against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.table import Table

from nearfar.cli import loading
from nearfar.cli.bench_host import run_host
from nearfar.cli.options import Settings, engine_options
from nearfar.cli.output import Output, facts_table, format_seconds
from nearfar.cli.outputs import agreed, force_option
from nearfar.config import DEFAULT_MODEL, format_bytes

if TYPE_CHECKING:
    from nearfar.evaluation.contenders import Task
    from nearfar.evaluation.speed import DecodeCeiling, PrefillCeiling, Speed
    from nearfar.evaluation.turns import ContenderResult
    from nearfar.output.place import Place
    from nearfar.runtime.steps.timeline import Timeline

DEFAULT_SHAPE = "smollm2-135m"
DEFAULT_CONTEXT = 4096
DEFAULT_STEPS = {"decode": 32, "prefill": 3}


@click.command()
@click.argument("what", type=click.Choice(["decode", "prefill", "host"]))
@click.option(
    "--shape", help=f"Sizes of a known model, random weights.  [default: {DEFAULT_SHAPE}]"
)
@click.option("--model", "real_model", help=f"A real model instead, like {DEFAULT_MODEL}.")
@click.option(
    "--context", default=DEFAULT_CONTEXT, show_default=True, help="Tokens before the step."
)
@click.option("--batch", default=1, show_default=True, help="Sequences decoded together.")
@click.option(
    "--steps", type=int, help="Tokens decoded [default: 32], or prompts read [default: 3]."
)
@click.option(
    "--against",
    metavar="NAMES",
    help="Contenders to measure in turns, each in its own process and without a cap: policies, "
    "transformers-gpu, transformers-offloaded; separate several by commas. For host: faiss.",
)
@click.option("--trace", metavar="FILE", help="Write the stages of one step for chrome://tracing.")
@click.option("--picture", metavar="FILE", help="Draw the stages: a .svg, .png or .pdf file.")
@force_option
@engine_options("thinking", "max_new_tokens", "temperature", "top_p")
def bench(
    what: str,
    shape: str | None,
    real_model: str | None,
    context: int,
    batch: int,
    steps: int | None,
    against: str | None,
    trace: str | None,
    picture: str | None,
    force: bool,
    settings: Settings,
) -> None:
    """Measure decode, prefill or the host kernels, and the machine's ceiling for each.

    Decoding starts after random keys and values of a realistic distribution. host: one layer of
    llama-3.1-8b with 131,072 keys unless told otherwise; --steps are rounds.
    """
    if shape is not None and real_model is not None:
        raise click.UsageError("Give --shape or --model, not both.")
    if context < 1 or batch < 1 or (steps is not None and steps < 1):
        raise click.UsageError("--context, --batch and --steps must be 1 or more.")
    if what != "decode" and (batch > 1 or trace or picture):
        raise click.UsageError("--batch, --trace and --picture are for decode.")
    rivals = [name.strip() for name in (against or "").split(",") if name.strip()]
    if what == "host":
        if real_model is not None:
            raise click.UsageError("The host kernels have no model: give --shape.")
        return run_host(shape, context, steps, rivals, settings)
    steps = DEFAULT_STEPS[what] if steps is None else steps
    with Output(settings.as_json) as output:
        loading.check_policies([settings.config.policy])
        loading.note_threads(settings.config.threads, output)
        _check_rivals(rivals)
        drawing = _checked(trace, picture, force)
        name = real_model or shape or DEFAULT_SHAPE
        task = _task(what, name, (context, batch, steps), settings, random=real_model is None)
        output.record({"bench": what, "model": name, "policy": settings.config.policy})
        output.record({"context_tokens": context, "steps": steps, "batch": batch})
        speed = _measure(task, rivals, output)
        _show(task, speed, output)
        _write(speed.entries[0].timeline, task, drawing)


def _task(
    what: str, name: str, sizes: tuple[int, int, int], settings: Settings, *, random: bool
) -> Task:
    """The task; ``sizes`` are tokens of the context, sequences and steps."""
    from nearfar.evaluation.contenders import Task

    return Task(what, name, random, *sizes, settings.config)  # type: ignore[arg-type]


def _check_rivals(names: list[str]) -> None:
    from nearfar.evaluation.contenders import RIVALS

    loading.check_policies([name for name in names if name not in RIVALS])


class Drawing(NamedTuple):
    """Files for the stages of a step, and whether they may replace existing files."""

    trace: str | None
    picture: str | None
    replaces_trace: bool
    replaces_picture: bool


def _checked(trace: str | None, picture: str | None, force: bool) -> Drawing:
    """Refuse files that cannot be written, before anything is measured."""
    from nearfar.evaluation.timeline_files import picture_place, trace_place

    forced, places = [force, force], []
    for i, (name, find) in enumerate(((trace, trace_place), (picture, picture_place))):
        if name is not None:
            place, forced[i] = agreed(partial(_replacing, find, name), force)
            places.append(place)
    if len(places) == 2 and places[0].path == places[1].path:
        raise click.UsageError("--trace and --picture name one file. Name two.")
    return Drawing(trace, picture, *forced)


def _replacing(find: Callable[..., Place], name: str, overwrite: bool) -> Place:
    return find(name, overwrite=overwrite)


def _measure(task: Task, rivals: list[str], output: Output) -> Speed:
    from nearfar.evaluation.speed import DecodeCeiling, measure

    def show(ceiling: DecodeCeiling | PrefillCeiling) -> None:
        output.record({"ceiling": {"seconds": ceiling.seconds, **dataclasses.asdict(ceiling)}})
        facts = _decode_facts if isinstance(ceiling, DecodeCeiling) else _prefill_facts
        output.show(facts_table(facts(ceiling), "Ceiling"))  # type: ignore[arg-type]

    output.record(_place(task))
    with output.progress(f"Measuring {task.what}") as report:
        return measure(task, rivals, show, report)


def _place(task: Task) -> dict[str, str]:
    from nearfar.runtime.memory.hardware import choose_device, choose_dtype

    device, _ = choose_device(task.config.device)
    dtype, _ = choose_dtype(task.config.dtype, device)
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}


def _decode_facts(ceiling: DecodeCeiling) -> dict[str, str]:
    traffic = ceiling.traffic
    in_order = f"at {ceiling.sequential_bytes_per_second / 1e9:,.1f} GB/s in order"
    facts = {
        "weights": f"{format_bytes(traffic.weight_bytes)} {in_order}",
        "near keys and values": f"{format_bytes(traffic.near_bytes)} {in_order}",
    }
    if traffic.index_bytes:
        facts["near codes of far keys"] = f"{format_bytes(traffic.index_bytes)} {in_order}"
    facts["far keys and values"] = (
        f"{format_bytes(traffic.far_bytes)} at "
        f"{ceiling.gather_bytes_per_second / 1e9:.1f} GB/s in rows at random"
    )
    if ceiling.link_bytes_per_second:
        link = f"{ceiling.link_bytes_per_second / 1e9:.1f} GB/s over the link at the same time"
        facts["far keys and values"] += f", {link}"
    if ceiling.handoff_seconds:
        handoff = _ms(ceiling.handoff_seconds)
        facts["handoff"] = f"{handoff}, all layers, to a host that answers at once"
    how = ", near and far at the same time" if ceiling.overlap else ""
    return facts | {"ceiling": f"{_ms(ceiling.seconds)} per step{how}"}


def _prefill_facts(ceiling: PrefillCeiling) -> dict[str, str]:
    return {
        "matrix products": f"{ceiling.flops / 1e12:.2f} TFLOP "
        f"at {ceiling.flops_per_second / 1e12:.2f} TFLOP/s",
        "ceiling": f"{format_seconds(ceiling.seconds)} per prompt",
    }


def _show(task: Task, speed: Speed, output: Output) -> None:
    own, ceiling = speed.entries[0], speed.ceiling.seconds
    record = _record(own, own) | {"times_the_ceiling": _median(own) / ceiling}
    if task.what == "prefill":
        record["tokens_per_second"] = task.context_tokens / _median(own)
    else:
        record["tokens_per_second"] = task.batch / _median(own)
        record["far_bytes_read_per_token"] = own.far_bytes_read_per_step or 0.0
    output.record(record | own.memory)
    output.record({"contenders": [_record(entry, own) for entry in speed.entries]})
    output.show(_entries_table(task, speed))
    facts = {
        "times the ceiling": f"{record['times_the_ceiling']:.2f}",
        "tokens/s": f"{record['tokens_per_second']:,.1f}",
    }
    if task.what == "decode":
        facts["far read per token"] = format_bytes(record["far_bytes_read_per_token"])
    output.show(facts_table(facts | _memory_facts(own.memory), "\nMeasured"))
    if own.timeline is not None:
        _show_stages(own.timeline, output)


def _median(entry: ContenderResult) -> float:
    from nearfar.evaluation.speed import summarise

    return summarise(entry.seconds).median_seconds


def _record(entry: ContenderResult, own: ContenderResult) -> dict[str, Any]:
    from nearfar.evaluation.speed import summarise

    if not entry.seconds:
        return {"name": entry.name, "error": entry.error}
    timing = dataclasses.asdict(summarise(entry.seconds))
    found = {"name": entry.name, "samples": len(entry.seconds), **timing}
    found["times_ours"] = timing["median_seconds"] / _median(own)
    found["memory"] = entry.memory
    return found | ({"error": entry.error} if entry.error else {})


def _entries_table(task: Task, speed: Speed) -> Table:
    from nearfar.evaluation.speed import summarise

    unit = "prompt" if task.what == "prefill" else "step"
    table = Table("", f"time per {unit}", "p20", "p80", "times ours", "GPU peak", box=None)
    own = speed.entries[0]
    for entry in speed.entries:
        if not entry.seconds:
            table.add_row(entry.name, entry.error or "not measured")
            continue
        timing = summarise(entry.seconds)
        gpu = entry.memory.get("peak_gpu_bytes", 0)
        table.add_row(
            entry.name,
            _ms(timing.median_seconds),
            _ms(timing.p20_seconds),
            _ms(timing.p80_seconds),
            f"{timing.median_seconds / _median(own):.2f}",
            format_bytes(gpu) if gpu else "-",
        )
    return table


def _show_stages(timeline: Timeline, output: Output) -> None:
    stages, handoff = timeline.seconds_by_stage(), timeline.handoff_seconds()
    output.record({"stage_seconds": stages, "handoff_seconds_per_layer": handoff})
    facts = {stage: _ms(seconds) for stage, seconds in stages.items()}
    if handoff is not None:
        facts["handoff per layer"] = f"{handoff * 1e6:.1f} us beyond the longer attention"
    output.show(facts_table(facts, "\nStages of one step, with the times taken between them"))


def _write(timeline: Timeline | None, task: Task, drawing: Drawing) -> None:
    trace, picture = drawing.trace, drawing.picture
    if trace is None and picture is None:
        return
    from nearfar.errors import InvalidOptionError
    from nearfar.evaluation.timeline_files import write_picture, write_trace

    if timeline is None:
        raise InvalidOptionError(
            "Stages can be timed only on a GPU, under a policy that evicts nothing during decode. "
            "Leave out --trace and --picture."
        )
    if trace is not None:
        write_trace(timeline, trace, overwrite=drawing.replaces_trace)
    if picture is not None:
        title = f"{task.model}, {task.config.policy}, {task.context_tokens:,} tokens: three layers"
        title = f"{title} of one decode step"
        write_picture(timeline, picture, title, overwrite=drawing.replaces_picture)


def _memory_facts(memory: dict[str, int]) -> dict[str, str]:
    facts = {name: format_bytes(memory[f"{name}_bytes"]) for name in ("near", "far", "index")}
    facts["peak memory"] = format_bytes(memory["peak_rss_bytes"])
    if memory["peak_gpu_bytes"]:
        facts["peak GPU memory"] = format_bytes(memory["peak_gpu_bytes"])
    return facts


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.2f} ms"
