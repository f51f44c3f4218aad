from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import install, nearfar
from interrupts import heed_interrupts
from limits import LIMIT_SECONDS

from nearfar.cli.main import COMMANDS
from nearfar.errors import OutOfMemoryError

HEAVY = ("torch", "numpy", "numba", "transformers", "pypdf", "webencodings")


def run(*args: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    start = ["-c", code] if code else ["-m", "nearfar"]
    return subprocess.run(
        [sys.executable, *start, *args], capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


def test_help_names_every_command() -> None:
    result = nearfar("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout


LEAVES: list[tuple[str, ...]] = [(name,) for name in COMMANDS if name != "report"]
LEAVES += [("report", "page"), ("report", "memory")]


@pytest.mark.parametrize("command", LEAVES, ids=" ".join)
def test_every_command_has_help_json_and_debug(command: tuple[str, ...]) -> None:
    result = nearfar(*command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "--debug" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from nearfar.cli.main import cli
try:
    cli({arguments!r}, prog_name="nearfar")
except SystemExit as end:
    assert end.code == 0
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    assert run(code=code).stderr == "[]\n"


def test_version() -> None:
    assert nearfar("--version").stdout.startswith("nearfar, version ")


def test_an_unknown_command_is_answered_with_the_nearest() -> None:
    result = run("polices")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "Error: Unknown command 'polices'. Did you mean 'policies'? "
        "Known: ask, bench, cache, compare, doctor, generate, index, policies, qa, report.\n"
    )


def test_an_unknown_option_is_a_usage_error() -> None:
    result = nearfar("qa", "x", "--budgett", "3")
    assert result.exit_code == 2
    assert "No such option" in result.stderr
    assert "--budget" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "floatt32"], "Unknown dtype 'floatt32'. Did you mean 'float32'?"),
        (["--far-dtype", "bflot16"], "Unknown far dtype 'bflot16'. Did you mean 'bfloat16'?"),
        (["--policy", "skech"], "Unknown policy 'skech'. Did you mean 'sketch'?"),
        (["--budget", "0"], "A budget is a whole number of far keys per KV group"),
        (["--budget", "1.5"], "Got 1.5."),
        (["--budget", "nan"], "Got nan."),
        (["--budget", "many"], "(like 0.02), or what a token may read of keys and values in all"),
        (["--budget", "0MiB"], "Got '0MiB'."),
        (["--budget", "12 parsecs"], "Got '12 parsecs'."),
        (["--sinks", "-1"], "sinks must be 0 or more. Got -1."),
        (["--window", "0"], "window must be 1 or more. Got 0."),
        (["--threads", "0"], "threads must be 1 or more. Got 0."),
        (["--temperature", "-1"], "temperature must be 0 or more. Got -1.0."),
        (["--top-p", "0"], "top-p must be above 0 and at most 1. Got 0.0."),
        (["--max-new-tokens", "0"], "max-new-tokens must be 1 or more. Got 0."),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N. Got 'tpu'."),
        (["--near-memory", "much"], "A size is a number and a unit, like 24GiB or 800MB."),
        (["--far-memory", "3 XB"], "Got '3 XB'."),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = install(monkeypatch)
    document = tmp_path / "a.txt"
    document.write_text("text")
    result = nearfar("qa", document, "-q", "What?", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line
    assert log == []


def test_a_value_of_the_wrong_type_is_a_usage_error() -> None:
    result = nearfar("qa", "x", "--window", "many")
    assert result.exit_code == 2
    assert "'many' is not a valid integer" in result.stderr


@pytest.mark.parametrize(
    ("command", "near"),
    [
        (["qa", "x", "-q", "a", "--policy", "skech"], " Did you mean 'sketch'?"),
        (["generate", "x", "--policy", "nonsense:bits=4"], ""),
        (["compare", "--tasks", "vt", "--policies", "full,skech"], " Did you mean 'sketch'?"),
        (["report", "memory", "--policies", "skech"], " Did you mean 'sketch'?"),
    ],
)
def test_a_mistyped_policy_is_refused_before_anything_heavy(command: list[str], near: str) -> None:
    code = f"""
import sys
from nearfar.cli.main import cli
try:
    cli({command!r}, prog_name="nearfar")
except SystemExit as end:
    assert end.code == 2
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = run(code=code)
    wrong = "nonsense" if "generate" in command else "skech"
    assert done.stdout == "[]\n"
    assert done.stderr.startswith(f"Error: Unknown policy {wrong!r}.{near} Known: adakv,")


def test_a_missing_document(tmp_path: Path) -> None:
    """In a folder of its own: what else is in a folder decides what is offered."""
    (tmp_path / "notes.txt").write_text("text")
    result = run("qa", str(tmp_path / "nots.txt"), "-q", "What?")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"Error: {tmp_path}/nots.txt does not exist. Did you mean {tmp_path}/notes.txt?\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("qa", "GONE", "-q", "What?"),
        ("index", "GONE"),
        ("generate", "--file", "GONE"),
        ("ask", "GONE", "-q", "What?"),
        ("compare", "GONE", "-q", "What?", "--policies", "full"),
        ("compare", "--tasks", "qa", "--data", "GONE", "--policies", "full"),
        ("report", "GONE"),
        ("cache", "show", "GONE"),
        ("cache", "verify", "GONE"),
        ("generate", "text", "--model", "./GONE"),
        ("generate", "text", "--model", "GONE"),
        ("generate", "text", "--model", "GONE.gguf"),
        ("generate", "text", "--model", ""),
    ],
    ids=" ".join,
)
def test_what_is_named_and_not_there_is_a_mistake_of_usage(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = nearfar(*arguments)
    assert result.exit_code == 2, result.stderr
    named = [each for each in arguments if "GONE" in each]
    assert all(each.removeprefix("./") in result.stderr for each in named)
    unnamed = nearfar(*("" if "GONE" in each else each for each in arguments))
    assert (unnamed.exit_code, "''" in unnamed.stderr) == (2, True), unnamed.stderr
    (tmp_path / "GONE").mkdir()
    result = nearfar(*arguments)
    if not any(each in arguments for each in ("--model", "cache")):
        assert (result.exit_code, "GONE is a folder" in result.stderr) == (2, True)


@pytest.mark.parametrize("place", ["group", "command"])
def test_debug_shows_where_an_error_came_from(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, fail_with=OutOfMemoryError("Far memory is full."))
    document = tmp_path / "a.txt"
    document.write_text("text")
    command = ["qa", str(document), "-q", "What?"]
    result = nearfar(*(["--debug", *command] if place == "group" else [*command, "--debug"]))
    assert isinstance(result.exception, OutOfMemoryError)


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = """
import sys, nearfar.cli.main as main
from nearfar.cli.output import Output
from nearfar.cli import policies
def many(as_json):
    with Output(False) as output:
        while True:
            output.write("line\\n")
policies.policies.callback = many
main.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, "policies"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=LIMIT_SECONDS) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("phase", "number", "said"),
    [
        ("prepare", signal.SIGINT, "Interrupted"),
        ("load", signal.SIGINT, "Interrupted"),
        ("read", signal.SIGINT, "Interrupted"),
        ("stream", signal.SIGINT, "Interrupted"),
        ("read", signal.SIGTERM, "Terminated"),
        ("stream", signal.SIGHUP, "Terminated"),
    ],
)
def test_a_signal_in_any_phase(
    phase: str, number: signal.Signals, said: str, tmp_path: Path
) -> None:
    document = tmp_path / "a.txt"
    document.write_text("some text")
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import pytest, fake_engine
from nearfar.cli.main import main
fake_engine.install(pytest.MonkeyPatch())
engine = sys.modules["nearfar.runtime.engine.engine"]
prepared = sys.modules["nearfar.runtime.engine.prepared"]
def wait(*args, **more):
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)
owner, name = dict(
    prepare=(prepared, "prepare"),
    load=(engine.Engine, "from_prepared"),
    read=(fake_engine.FakeEngine, "read"),
    stream=(fake_engine.FakeDocument, "stream"),
)[{phase!r}]
setattr(owner, name, wait)
main()
"""
    asked = ["qa", str(document), "-q", "What?", "--json", "--no-cache"]
    command = [sys.executable, "-c", code, *asked]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line == "waiting\n":
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 128 + number
    assert out == ""
    assert err == f"\n{said}.\n"


def test_a_path_that_the_system_refuses() -> None:
    result = nearfar("generate", "Hello", "--model", "a" * 5000)
    assert result.exit_code == 1
    assert "Error: The system refused a file: [Errno 36] File name too long" in result.stderr
    assert "Traceback" not in result.output
