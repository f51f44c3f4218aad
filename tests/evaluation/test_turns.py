from __future__ import annotations

import time

import pytest
from test_speed import quick_bandwidth  # noqa: F401  a fixture

from nearfar.config import EngineConfig
from nearfar.errors import NearfarError
from nearfar.evaluation import speed
from nearfar.evaluation.contenders import Contender, Task
from nearfar.evaluation.turns import ContenderResult, LocalContender, started, take_turns


class Counted(Contender):
    def __init__(self, log: list[str], name: str, seconds: float = 0.0) -> None:
        self.log, self.name, self.seconds = log, name, seconds

    def work(self) -> None:
        self.log.append(self.name)
        time.sleep(self.seconds)
        if self.name == "bad" and self.log.count("bad") == 2:
            raise NearfarError("It broke.")

    def memory(self) -> dict[str, int]:
        return {"peak_rss_bytes": 7}


def task(**changes: object) -> Task:
    config = EngineConfig(budget=16, dtype="float32", device="cpu", policy="full", threads=1)
    shape = {"what": "decode", "model": "smollm2-135m", "random": True, "context_tokens": 30}
    return Task(**(shape | {"batch": 1, "steps": 3, "config": config} | changes))  # type: ignore[arg-type]


def test_turns_alternate_and_a_failure_is_noted() -> None:
    log: list[str] = []
    entries = [ContenderResult("a"), ContenderResult("bad"), ContenderResult("c")]
    contenders = [(entry, LocalContender(Counted(log, entry.name))) for entry in entries]
    rounds: list[tuple[int, int]] = []
    take_turns(contenders, 4, lambda *round_: rounds.append(round_))
    assert log == ["a", "bad", "c", "a", "bad", "c", "a", "c", "a", "c"]
    assert rounds == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(entry.seconds) for entry in entries] == [4, 1, 4]
    assert [entry.error for entry in entries] == [None, "It broke.", None]
    assert entries[0].memory == {"peak_rss_bytes": 7}


def test_slow_ones_do_fewer() -> None:
    log: list[str] = []
    slow = LocalContender(Counted(log, "slow", seconds=0.02))
    assert len(slow.turn(100, 0.05)) <= 4
    assert len(slow.turn(2, 10.0)) == 2


def test_contenders_in_processes_of_their_own() -> None:
    """The whole way: two processes, turns, and a rival that needs what is not here."""
    found = speed.measure(task(), ["streaming-llm", "transformers-gpu"])
    own, other, none = found.entries
    assert len(own.seconds) == len(other.seconds) == 3
    assert own.memory["near_bytes"] > 0
    assert none.error == (
        "transformers-gpu needs a CUDA GPU, and none is used here. Leave it out of --against."
    )


def test_a_contender_that_cannot_start_says_why() -> None:
    config = task().config.replace(policy="full-far", far_memory_bytes=10)
    with started(task(config=config, context_tokens=3000), "full-far") as remote:  # noqa: SIM117
        with pytest.raises(NearfarError, match="Not enough far memory"):
            remote.ready()
