"""`nearfar bench`: the ceiling of this machine, then what nearfar reaches of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from nearfar.cli import loading
from nearfar.cli.options import Settings, engine_options
from nearfar.cli.output import Output, facts_table, format_seconds
from nearfar.config import DEFAULT_MODEL, format_bytes

if TYPE_CHECKING:
    from nearfar.evaluation.speed import DecodeCeiling, PrefillCeiling, Timing
    from nearfar.runtime.engine import Engine
    from nearfar.runtime.results import MemoryReport

DEFAULT_SHAPE = "smollm2-135m"
DEFAULT_CONTEXT = 4096
MARGIN_TOKENS = 8  # room for warm-up steps
DEFAULT_STEPS = {"decode": 32, "prefill": 3}


@click.command()
@click.argument("what", type=click.Choice(["decode", "prefill"]))
@click.option(
    "--shape", help=f"Sizes of a known model, random weights.  [default: {DEFAULT_SHAPE}]"
)
@click.option("--model", "real_model", help=f"A real model instead, like {DEFAULT_MODEL}.")
@click.option(
    "--context", default=DEFAULT_CONTEXT, show_default=True, help="Tokens before the step."
)
@click.option(
    "--steps", type=int, help="Tokens decoded [default: 32], or prompts read [default: 3]."
)
@engine_options("max_new_tokens", "temperature", "top_p")
def bench(
    what: str,
    shape: str | None,
    real_model: str | None,
    context: int,
    steps: int | None,
    settings: Settings,
) -> None:
    """Measure decode or prefill: first what the machine allows, then what nearfar does."""
    if shape is not None and real_model is not None:
        raise click.UsageError("Give --shape or --model, not both.")
    steps = DEFAULT_STEPS[what] if steps is None else steps
    if context < 1 or steps < 1:
        raise click.UsageError("--context and --steps must be 1 or more.")
    with Output(settings.as_json) as output:
        loading.check_policies([settings.config.policy])
        name = real_model or shape or DEFAULT_SHAPE
        if real_model is not None:
            settings = dataclasses.replace(settings, model=real_model)
        tokens = context + steps + MARGIN_TOKENS
        engine = _engine(settings, None if real_model else name, tokens, output)
        output.record({"bench": what, "model": name, "policy": settings.config.policy})
        output.record({"context_tokens": context, "steps": steps, "dtype": engine.dtype})
        run = _decode if what == "decode" else _prefill
        run(engine, context, steps, output)


def _engine(settings: Settings, shape: str | None, tokens: int, output: Output) -> Engine:
    """Random weights of a shape, with room for ``tokens``, or a real model."""
    if shape is not None:
        from nearfar.evaluation.shapes import shape_config
        from nearfar.runtime.engine import Engine

        model = shape_config(shape, tokens)
        return Engine.random(model, settings.config, seed=settings.config.seed)
    prepared = loading.prepare_model(settings, output)
    return loading.open_engine(settings, prepared, tokens, output)


def _decode(engine: Engine, context: int, steps: int, output: Output) -> None:
    from nearfar.evaluation.speed import bench_decode

    speed = bench_decode(engine, context, steps, lambda found: _show_decode(found, output))
    output.record({"far_bytes_read_per_token": speed.far_bytes_read_per_token})
    output.record(_times(speed.timing, speed.ceiling.seconds) | dataclasses.asdict(speed.memory))
    facts = _time_facts(speed.timing, speed.ceiling.seconds, "token")
    facts["far read per token"] = format_bytes(speed.far_bytes_read_per_token)
    output.show(facts_table(facts | _memory_facts(speed.memory), "\nMeasured"))


def _prefill(engine: Engine, context: int, steps: int, output: Output) -> None:
    from nearfar.evaluation.speed import bench_prefill

    speed = bench_prefill(engine, context, steps, lambda found: _show_prefill(found, output))
    rate = context / speed.timing.median_seconds
    output.record({"tokens_per_second": rate})
    output.record(_times(speed.timing, speed.ceiling.seconds) | dataclasses.asdict(speed.memory))
    facts = _time_facts(speed.timing, speed.ceiling.seconds, "prompt")
    facts["tokens/s"] = f"{rate:,.0f}"
    output.show(facts_table(facts | _memory_facts(speed.memory), "\nMeasured"))


def _show_decode(ceiling: DecodeCeiling, output: Output) -> None:
    traffic = ceiling.traffic
    in_order = f"at {ceiling.sequential_bytes_per_second / 1e9:.1f} GB/s in order"
    facts = {
        "weights": f"{format_bytes(traffic.weight_bytes)} {in_order}",
        "near keys and values": f"{format_bytes(traffic.near_bytes)} {in_order}",
        "far keys and values": f"{format_bytes(traffic.far_bytes)} at "
        f"{ceiling.gather_bytes_per_second / 1e9:.1f} GB/s in rows at random",
        "ceiling": f"{_ms(ceiling.seconds)} per token"
        + (", near and far at the same time" if ceiling.overlap else ""),
    }
    output.record({"ceiling": {"seconds": ceiling.seconds, **dataclasses.asdict(ceiling)}})
    output.show(facts_table(facts, "Ceiling"))


def _show_prefill(ceiling: PrefillCeiling, output: Output) -> None:
    facts = {
        "matrix products": f"{ceiling.flops / 1e12:.2f} TFLOP "
        f"at {ceiling.flops_per_second / 1e12:.2f} TFLOP/s",
        "ceiling": f"{format_seconds(ceiling.seconds)} per prompt",
    }
    output.record({"ceiling": {"seconds": ceiling.seconds, **dataclasses.asdict(ceiling)}})
    output.show(facts_table(facts, "Ceiling"))


def _times(timing: Timing, ceiling_seconds: float) -> dict[str, Any]:
    return {
        **dataclasses.asdict(timing),
        "times_the_ceiling": timing.median_seconds / ceiling_seconds,
    }


def _time_facts(timing: Timing, ceiling_seconds: float, unit: str) -> dict[str, str]:
    spread = f"p20 {_ms(timing.p20_seconds)}, p80 {_ms(timing.p80_seconds)}"
    return {
        f"time per {unit}": f"{_ms(timing.median_seconds)} (median; {spread})",
        "times the ceiling": f"{timing.median_seconds / ceiling_seconds:.2f}",
    }


def _memory_facts(memory: MemoryReport) -> dict[str, str]:
    facts = {
        name: format_bytes(getattr(memory, f"{name}_bytes")) for name in ("near", "far", "index")
    }
    facts["peak memory"] = format_bytes(memory.peak_rss_bytes)
    if memory.peak_gpu_bytes:
        facts["peak GPU memory"] = format_bytes(memory.peak_gpu_bytes)
    return facts


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.2f} ms"
