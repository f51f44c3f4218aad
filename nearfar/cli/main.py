"""The command `nearfar`: finds the subcommand, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 an error, 2 a wrong command line, and as in shells 128 plus the number of a
signal: 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from types import FrameType

import click

from nearfar import errors
from nearfar.cli.options import debug_option

COMMANDS = (
    "qa",
    "index",
    "ask",
    "cache",
    "generate",
    "compare",
    "report",
    "bench",
    "policies",
    "doctor",
)
ENDING = (signal.SIGTERM, signal.SIGHUP)  # other signals that end a command


class Terminated(KeyboardInterrupt):
    """A signal ends the command: it is handled and cleaned up like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Commands(click.Group):
    """The subcommands, each in the module of its name, imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names in the order of help."""
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        """The command called ``cmd_name``, or None."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"nearfar.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command at the start of ``args``; the error for an unknown one offers the nearest."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise errors.UnknownNameError("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run; an error that the user can act on becomes one line."""
        try:
            return super().invoke(ctx)
        except errors.NearfarError as error:
            if ctx.meta.get("nearfar.debug"):
                raise
            text = str(error)
            if isinstance(error, errors.OutputExistsError):  # advice for a call in Python
                text = f"{error.state} Name another file."
            click.echo(f"Error: {text}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # of a path or a disk; a pipe that closed is click's to handle
            if error.errno == errno.EPIPE or ctx.meta.get("nearfar.debug"):
                raise
            click.echo(f"Error: The system refused a file: {str(error)[:300]}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Terminated) else signal.SIGINT
            how = "Interrupted" if number == signal.SIGINT else "Terminated"
            click.echo(f"\n{how}.", err=True)
            ctx.exit(128 + number)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nearfar")
@debug_option
def cli() -> None:
    """Ask a language model about documents longer than the GPU's memory.

    Near memory holds the weights, the first and the last tokens; all other keys and values are in
    host memory, where an index finds the few that each new token needs.
    """


def main() -> None:
    """Run `nearfar` with the arguments of the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may write what a terminal cannot show
    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores some, and means it
            signal.signal(number, _terminate)
    cli(prog_name="nearfar")


def _terminate(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends it at once
    raise Terminated(number)
