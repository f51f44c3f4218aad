"""Threads, processes and numbers of threads: engines take turns, and a forked process says no."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from saved_cases import NINE, QUESTION, tiny_engine
from tiny_folder import text_of

from nearfar.errors import EndedAnswerError
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.workplace import Hands

LIMIT_SECONDS = 120  # of anything that is waited for
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return tiny_engine(folder)


def at_once(*works: Callable[[], object]) -> list[object]:
    """What each returns, each in a thread of its own; an error is what it returns."""
    results: list[object] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(number: int) -> None:
        try:
            start.wait(LIMIT_SECONDS)
            results[number] = works[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()
    return results


def test_threads_that_ask_one_document_take_turns(engine: Engine) -> None:
    document = engine.read(text_of(90))
    questions = [QUESTION, "where?", "and then?"]
    wanted = [document.ask(question, NINE).token_ids for question in questions]
    works = [lambda q=q: [document.ask(q, NINE).token_ids for _ in range(3)] for q in questions]
    assert at_once(*works) == [[each] * 3 for each in wanted]


def test_threads_that_ask_and_read_with_engines_of_their_own(engine: Engine) -> None:
    """Of one model and of two, under policies that select and that evict."""
    engines = [engine, engine.with_policy("h2o"), engine.with_policy("full-far")]
    texts = [text_of(90, seed=seed) for seed in range(3)]
    pairs = list(zip(engines, texts, strict=True))

    def answers(engine: Engine, text: str) -> list[Any]:
        asked = engine.read(text).ask(QUESTION, NINE).token_ids
        return [asked, *(g.token_ids for g in engine.generate([text, QUESTION], NINE))]

    wanted = [answers(*pair) for pair in pairs]
    assert at_once(*(lambda p=p: answers(*p) for p in pairs)) == wanted
    assert engine._ledger.used_bytes == 0


def test_threads_that_share_a_conversation_take_turns(engine: Engine) -> None:
    talk = engine.read(text_of(90)).conversation()
    at_once(*[lambda: talk.ask(QUESTION, NINE)] * 3)
    other = engine.read(text_of(90)).conversation()
    wanted = [other.ask(QUESTION, NINE).text for _ in range(3)]
    assert [turn.answer for turn in talk.turns] == wanted


def test_a_stream_of_another_thread_holds_nobody_up(engine: Engine) -> None:
    document, other = engine.read(text_of(90)), engine.read(text_of(80))
    wanted = document.ask(QUESTION, NINE).token_ids
    half_read, elsewhere = document.stream("where?", NINE), other.stream("where?", NINE)
    next(half_read)
    next(elsewhere)
    assert at_once(lambda: document.ask(QUESTION, NINE).token_ids) == [wanted]
    with pytest.raises(EndedAnswerError, match="ended when the document was asked again"):
        next(half_read)
    assert elsewhere.result.token_ids == other.ask("where?", NINE).token_ids


def test_streams_of_two_threads_give_right_tokens_or_say_why_not(engine: Engine) -> None:
    document = engine.read(text_of(90))
    questions = [QUESTION, "where?"]
    wanted = [document.ask(question, NINE).text for question in questions]
    got = at_once(*(lambda q=q: "".join(document.stream(q, NINE)) for q in questions))
    assert any(text in wanted for text in got)
    for text, right in zip(got, wanted, strict=True):
        assert text == right or isinstance(text, EndedAnswerError)


def threads_now() -> tuple[int, int]:
    return torch.get_num_threads(), numba.get_num_threads()


def test_an_engine_works_with_its_threads_and_leaves_the_number_alone(folder: Path) -> None:
    most = numba.config.NUMBA_NUM_THREADS
    before, seen = threads_now(), []
    one, several = tiny_engine(folder, threads=1), tiny_engine(folder, threads=most)
    assert threads_now() == before

    def note(*_: int) -> None:
        seen.append(threads_now())

    document = one.read(text_of(20), progress=note)
    several.read(text_of(20), progress=note)
    document.extend(text_of(20), progress=note)
    assert dict.fromkeys(seen) == dict.fromkeys([(1, 1), (most, most)])
    assert seen[0] == seen[-1] == (1, 1)
    at_once(lambda: document.extend(text_of(20), progress=note))  # where nothing was ever set
    assert seen[-1] == (1, 1)
    assert threads_now() == before
    with pytest.raises(ZeroDivisionError):
        one.hands.run(lambda: 1 / 0)
    assert threads_now() == before


def test_a_turn_may_be_taken_within_a_turn() -> None:
    outer, inner = Hands(1), Hands(1)
    assert outer.run(inner.run, threads_now) == (1, 1)


FORKS = """
import os, sys
sys.path[:0] = {paths!r}
import signal
from pathlib import Path
from saved_cases import NINE, QUESTION, tiny_engine
from nearfar.errors import NearfarError

def child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a child that hangs is killed, and says nothing
        try:
            print("child:", work(), flush=True)
        except NearfarError as error:
            print("child:", type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)

folder = Path({folder!r})
make = lambda: tiny_engine(folder, threads=2)
answer = lambda engine: engine.read("the cat sat under a red house " * 20).ask(QUESTION, NINE).text
{rest}
"""
AFTER_USE = """
engine = make()
document = engine.read("the cat sat under a red house " * 20)
wanted = document.ask(QUESTION, NINE).text
for work in (lambda: document.ask(QUESTION, NINE), lambda: engine.read("the cat"), make,
             lambda: engine.with_policy("h2o").generate("the"), lambda: document.memory_report()):
    child(work)
assert document.ask(QUESTION, NINE).text == wanted
"""
BEFORE_USE = """
child(lambda: answer(make()) != "")
print("parent:", answer(make()) != "")
"""
LOADER = """
import torch

class Answers(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, i):
        return document.ask(QUESTION, NINE).text

try:
    list(torch.utils.data.DataLoader(Answers(), num_workers=1, multiprocessing_context="fork",
                                     timeout=60))
except NearfarError as error:
    print("loader:", str(error).splitlines()[-1])
"""


def run_forks(folder: Path, rest: str) -> list[str]:
    paths = [str(TESTS), str(TESTS.parent), str(TESTS.parent.parent)]
    program = FORKS.format(paths=paths, folder=str(folder), rest=rest)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS * 2,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SAYS = (
    'ForkedProcessError This process was forked (os.fork, multiprocessing\'s "fork", workers of a '
    "torch DataLoader) after nearfar had computed in its parent, whose threads are not here. Start "
    'processes by multiprocessing.get_context("spawn") and make the engine in each, or fork before '
    "the first engine is made."
)


@pytest.mark.slow
def test_a_process_forked_after_use_says_so(engine: Engine, folder: Path) -> None:
    """Whatever it wants of an engine, and as a worker of a data loader too."""
    assert engine.device == "cpu"  # the folder is there
    *children, loader = run_forks(folder, AFTER_USE + LOADER)
    assert children == [f"child: {SAYS}"] * 5
    assert SAYS.removeprefix("ForkedProcessError ") in loader


@pytest.mark.slow
def test_a_process_forked_before_use_works(engine: Engine, folder: Path) -> None:
    assert engine.device == "cpu"
    assert run_forks(folder, BEFORE_USE) == ["child: True", "parent: True"]
