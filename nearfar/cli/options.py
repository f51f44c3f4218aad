"""Options that commands share; their defaults and rules are those of nearfar.config.

A command decorated with `engine_options` receives one `Settings` in place of all the values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from nearfar.config import (
    COMPUTE_DTYPES,
    DEFAULT_MODEL,
    FAR_DTYPES,
    EngineConfig,
    SamplingConfig,
    parse_budget,
    parse_bytes,
)
from nearfar.errors import InvalidOptionError, UnknownNameError

Command = Callable[..., Any]
ALL = "all"  # policies


@dataclass(frozen=True)
class Settings:
    """The settings of one command line."""

    model: str
    config: EngineConfig
    sampling: SamplingConfig
    as_json: bool


@dataclass(frozen=True)
class QuestionOptions:
    """Questions, and how they are read and answered."""

    questions: tuple[str, ...]
    reading: Literal["exact", "policy"]
    sources: int


class Option(NamedTuple):
    """The command-line option of one field of a configuration."""

    flag: str
    kind: Any  # a type, or a function from text to value
    help: str
    metavar: str | None = None


def _one_of(what: str, known: tuple[str, ...], flag: str, text: str) -> Option:
    """An option with a few names; the error for a mistyped name offers the nearest."""

    def convert(name: str) -> str:
        if name not in known:
            raise UnknownNameError(what, name, known)
        return name

    return Option(flag, convert, text, f"[{'|'.join(known)}]")


def file_path(text: str) -> Path:
    """The path of a file to read; the opening of the file checks that it exists."""
    if not text:
        raise InvalidOptionError("'' is not a file name. Name one.")
    return Path(text)


def policy_spec(text: str) -> str:
    """A policy as written on a command line, after a check of its name."""
    from nearfar.policies.registry import check_policy_name

    check_policy_name(text)
    return text


SOURCES = 3  # passages that --sources shows

ENGINE_FIELDS = {
    "policy": Option(
        "--policy", policy_spec, "Which keys a step reads: NAME or NAME:PARAMETER=VALUE.", "NAME"
    ),
    "budget": Option(
        "--budget",
        parse_budget,
        "Far keys read per KV group and token; below 1, a share; or bytes a token, like 16MiB.",
        "KEYS",
    ),
    "sinks": Option("--sinks", int, "First tokens kept in near memory."),
    "window": Option("--window", int, "Last tokens kept in near memory."),
    "threads": Option("--threads", int, "Host threads.  [default: physical cores]"),
    "dtype": _one_of("dtype", COMPUTE_DTYPES, "--dtype", "Type of weights and activations."),
    "far_dtype": _one_of("far dtype", FAR_DTYPES, "--far-dtype", "Type of far keys and values."),
    "near_memory_bytes": Option(
        "--near-memory", parse_bytes, "Cap, like 24GiB.  [default: free memory]", "SIZE"
    ),
    "far_memory_bytes": Option(
        "--far-memory", parse_bytes, "Cap, like 200GiB.  [default: free memory]", "SIZE"
    ),
    "thinking": Option(
        "--thinking/--no-thinking", bool, "Let the model think before it answers, or not."
    ),
    "device": Option("--device", str, "Device of near memory: auto, cpu, cuda or cuda:N."),
}
READING = _one_of(
    "way to read a question (-q is its text)",
    ("exact", "policy"),
    "--question",
    "Keys that a question attends to: all that are kept, or those that the policy selects.",
)
SAMPLING_FIELDS = {
    "max_new_tokens": Option("--max-new-tokens", int, "Maximum length of an answer."),
    "temperature": Option("--temperature", float, "0 takes the most likely token."),
    "top_p": Option("--top-p", float, "Draw from the top tokens with this total probability."),
    "seed": Option("--seed", int, "Seed of sampling and of the policy's random draws."),
}


def split_names(text: str) -> tuple[str, ...]:
    """Names separated by commas, without repetition."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def split_policies(text: str) -> tuple[str, ...]:
    """Policies separated by commas, with checked names, or only ``all``."""
    names = split_names(text)
    return names if names == (ALL,) else tuple(policy_spec(name) for name in names)


def _field_options(fields: dict[str, Option], owner: type[Any]) -> list[Command]:
    defaults = {field.name: field.default for field in dataclasses.fields(owner)}
    return [
        click.option(
            option.flag,
            field,
            type=option.kind,
            metavar=option.metavar,
            default=defaults[field],
            show_default=defaults[field] is not None,
            help=option.help,
        )
        for field, option in fields.items()
    ]


def model_option(command: Command) -> Command:
    """Add --model."""
    return click.option(
        "--model",
        default=DEFAULT_MODEL,
        show_default=True,
        help="A built-in name, a folder, a GGUF file or a Hugging Face id.",
    )(command)


def json_option(command: Command) -> Command:
    """Add --json."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
    )(command)


def question_options(command: Command) -> Command:
    """Add -q, --question and --sources; the command receives one `QuestionOptions`, ``asked``."""

    @functools.wraps(command)
    def with_asked(
        *args: Any, questions: tuple[str, ...], reading: Any, sources: bool, **values: Any
    ) -> Any:
        return command(
            *args, asked=QuestionOptions(questions, reading, SOURCES if sources else 0), **values
        )

    options = [
        click.option(
            "-q", "questions", multiple=True, help="A question; may be given several times."
        ),
        click.option(
            READING.flag,
            "reading",
            type=READING.kind,
            metavar=READING.metavar,
            default="exact",
            show_default=True,
            help=READING.help,
        ),
        click.option("--sources", is_flag=True, help="Show the passages that answers come from."),
    ]
    decorated: Command = with_asked
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta["nearfar.debug"] = True


def debug_option(command: Command) -> Command:
    """Add --debug, which `nearfar.cli.main` evaluates."""
    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_remember_debug,
        help="Show where an error came from.",
    )(command)


def engine_options(*without: str) -> Callable[[Command], Command]:
    """Add the options of engine and sampling, except for the fields named in ``without``.

    The command receives them as one keyword argument, ``settings``.
    """
    engine_fields = {name: ENGINE_FIELDS[name] for name in ENGINE_FIELDS if name not in without}
    sampling_fields = {n: SAMPLING_FIELDS[n] for n in SAMPLING_FIELDS if n not in without}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_settings(*args: Any, as_json: bool, **values: Any) -> Any:
            engine = {field: values.pop(field) for field in engine_fields}
            sampling = {field: values.pop(field) for field in sampling_fields}
            model = values.pop("model", DEFAULT_MODEL)
            config = EngineConfig(**engine, seed=sampling["seed"])
            settings = Settings(model, config, SamplingConfig(**sampling), as_json)
            return command(*args, settings=settings, **values)

        options = [
            *_field_options(engine_fields, EngineConfig),
            *_field_options(sampling_fields, SamplingConfig),
            json_option,
            debug_option,
        ]
        decorated: Command = with_settings
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate
