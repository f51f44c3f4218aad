"""An engine for tests of the command line: answers are canned, tokens are words."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nearfar.cli.main import cli
from nearfar.config import EngineConfig, SamplingConfig
from nearfar.errors import OutOfMemoryError
from nearfar.records import Verification
from nearfar.results import Answer, MemoryReport
from nearfar.runtime.engine import document_cache as cache
from nearfar.runtime.saved.document_state import Model

MAX_CONTEXT_TOKENS = 1000
ANSWERS = {"full": "The code is 7421.", "sketch": "The code is 7421.", "streaming-llm": "I forgot."}
ANSWERS["verified:epsilon=0.2"] = "The code is 7421."
HELD = Verification(0.184, 5400, 120, 7, 0.31)
Progress = Callable[[int, int], None]


class FakeStream:
    def __init__(self, question: str, text: str, held: Verification | None = None) -> None:
        self.words = [word + " " for word in text.split()]
        self.question, self.text = question, text
        ids = tuple(len(word) for word in self.words)
        numbers = (7, 0.5, 0.25, 40.0, 4096.0)
        self.result = Answer(text, ids, "stop", *numbers, question, verification=held)

    def __iter__(self) -> Iterator[str]:
        yield from self.words


@dataclass
class FakeDocument:
    engine: FakeEngine
    text: str
    prefill_seconds: float = 1.5
    was_opened: bool = False

    @property
    def tokens(self) -> int:
        return len(self.text.split())

    def stream(self, question: str, sampling: SamplingConfig, **_how: Any) -> FakeStream:
        self.engine.log.append(("stream", question, sampling))
        sys.stdout.write("a library prints this\n")
        if self.engine.fail_with is not None:
            raise self.engine.fail_with
        policy = self.engine.config.policy
        held = HELD if policy.startswith("verified") else None
        return FakeStream(question, ANSWERS[policy], held)

    def ask(self, question: str, sampling: SamplingConfig) -> Answer:
        return self.stream(question, sampling).result

    def write(self, path: Path, *, private: bool) -> None:
        """Nothing is kept: files are tested with real documents."""

    def memory_report(self) -> MemoryReport:
        return MemoryReport(10, 2048, 4096, 512, 2**20, 0)


@dataclass
class FakeEngine:
    config: EngineConfig = field(default_factory=EngineConfig)
    log: list[Any] = field(default_factory=list)
    fail_with: BaseException | None = None
    model_name: str = "fake"
    device: str = "cpu"
    dtype: str = "float32"

    def read(self, prompt: FakePrompt, progress: Progress | None = None) -> FakeDocument:
        self.log.append(("read", prompt.text))
        if progress is not None:
            progress(1, 2)
        if self.config.policy == "h2o":
            raise OutOfMemoryError("Near memory is full: 3 GiB needed, 2 GiB allowed.")
        if self.config.policy == "topk-oracle":
            raise ValueError("a defect")
        return FakeDocument(self, prompt.text)

    def stream(self, prompt: FakeIds, sampling: SamplingConfig, chat: bool = False) -> FakeStream:
        self.log.append(("generate", prompt.text, sampling, chat))
        return FakeStream("", "and so on")

    def with_policy(self, policy: str) -> FakeEngine:
        return FakeEngine(self.config.replace(policy=policy), self.log, self.fail_with)

    def memory_report(self) -> MemoryReport:
        return MemoryReport(10, 0, 0, 0, 2**20, 0)


class FakePrompt:
    def __init__(self, text: str) -> None:
        self.text, self.prefix_ids = text, text.split()

    def question_ids(self, question: str) -> list[str]:
        return question.split()


class FakeIds(list[str]):
    def __init__(self, text: str) -> None:
        super().__init__(text.split())
        self.text = text


class FakePrepared:
    config = types.SimpleNamespace(max_context_tokens=MAX_CONTEXT_TOKENS)
    model = Model("fake", "0" * 64)
    tokenizer = types.SimpleNamespace(identity="0" * 64)

    def document_prompt(self, text: str) -> FakePrompt:
        return FakePrompt(text)

    def prompt_ids(self, text: str, chat: bool) -> FakeIds:  # noqa: ARG002
        return FakeIds(text)


def install(monkeypatch: pytest.MonkeyPatch, fail_with: BaseException | None = None) -> list[Any]:
    """Put the fake in the engine's place; the list logs what it is asked to do."""
    log: list[Any] = []

    class Engine(FakeEngine):
        @staticmethod
        def from_prepared(
            _prepared: FakePrepared, config: EngineConfig, context_tokens: int | None
        ) -> FakeEngine:
            log.append(("plan", context_tokens, config))
            return FakeEngine(config, log, fail_with)

    def prepare(model: str, progress: Progress | None = None) -> FakePrepared:
        log.append(("prepare", model))
        if progress is not None:
            progress(1, 0)
        return FakePrepared()

    # the words around a document are those of a template, which this tokenizer lacks
    monkeypatch.setattr(cache, "DocumentPrompt", lambda *_: types.SimpleNamespace(prefix_ids=[7]))
    for name, value in (("engine", Engine), ("prepared", prepare)):
        module = types.ModuleType(f"nearfar.runtime.engine.{name}")
        setattr(module, value.__name__, value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return log


def nearfar(*args: object, stdin: str | bytes | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, [str(arg) for arg in args], input=stdin, prog_name="nearfar")
