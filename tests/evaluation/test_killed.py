"""kill -9 at random moments: the file ends as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from limits import LIMIT_SECONDS, Deadline
from tiny_comparison import TASKS, compare, tiny_engine_of, without_cost
from tiny_folder import make_folder

from nearfar.evaluation.harness.results import Results, read_rows

KILLS = 20
LONGEST_SECONDS = 0.8  # of a life, from when the process starts to compare


def work(folder: Path, path: Path, ready: Path) -> None:
    """One life: go on with the comparison until its end."""
    engine = tiny_engine_of(folder)
    ready.touch()
    with Results(path) as results:
        compare(engine, results, tasks=TASKS, samples=2)


def start(folder: Path, path: Path) -> BaseProcess:
    """A process that has its model and begins."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nearfar.evaluation.harness.runner", "transformers"])
    ready = path.with_suffix(".ready")
    ready.unlink(missing_ok=True)
    process = context.Process(target=work, args=(folder, path, ready))
    process.start()
    deadline = Deadline()
    while not ready.exists() and process.is_alive():
        deadline.check("a process with its model")
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_loses_and_repeats_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_folder(folder)
    whole = Results()
    compare(tiny_engine_of(folder), whole, tasks=TASKS, samples=2)
    rng = random.Random(0)
    kills, files = 0, 0
    while kills < KILLS:
        path = tmp_path / f"{files}.jsonl"
        files += 1
        finished = False
        while not finished:
            process = start(folder, path)
            if kills < KILLS:
                time.sleep(rng.uniform(0, LONGEST_SECONDS))
                process.kill()
            process.join(LIMIT_SECONDS)
            assert process.exitcode is not None, "the comparison goes on and on"
            finished = process.exitcode == 0
            kills += not finished
        lines = path.read_text().splitlines()
        assert len(lines) == len(set(lines)) == len(whole)
        assert without_cost(read_rows([path])) == without_cost(whole)
