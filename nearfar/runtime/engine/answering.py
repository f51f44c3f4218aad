"""Answers to questions about the tokens of a sequence, one at a time.

A sequence has one state: a new question takes it over and ends a stream that is still running.
Every answer starts by returning to a mark, so it does not depend on the end of the previous one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from nearfar.config import SamplingConfig
from nearfar.errors import EndedAnswerError, InvalidOptionError
from nearfar.progress import silent
from nearfar.results import Answer, Passage
from nearfar.runtime.engine.accounting import memory_errors
from nearfar.runtime.engine.generation import GenerationState, generation_of
from nearfar.runtime.engine.passages import AttentionRecorder, best_passages
from nearfar.runtime.engine.stream import TextStream
from nearfar.runtime.engine.token_engine import TokenEngine
from nearfar.runtime.engine.workplace import Hands
from nearfar.runtime.memory.sequence import Mark
from nearfar.runtime.memory.tail import SequenceDelta, put_back
from nearfar.runtime.saved.document_state import DocumentState
from nearfar.runtime.steps.decode import decode_step

QuestionMode = Literal["exact", "policy"]  # how the tokens of a question attend
Then = Callable[[GenerationState, str], None]  # the finished run and its text


@dataclass(frozen=True)
class Question:
    """A question, its token ids, and how it is read and answered."""

    text: str
    ids: list[int]
    reading: QuestionMode
    sources: int  # passages to name

    def __post_init__(self) -> None:
        if self.reading not in ("exact", "policy"):
            raise InvalidOptionError(
                f"A question is read 'exact' or through the 'policy'. Got {self.reading!r}."
            )
        if self.sources < 0:
            raise InvalidOptionError(f"sources must be 0 or more. Got {self.sources!r}.")


class Answerer:
    """The end of a document, and the answers that start there or after later turns."""

    def __init__(self, engine: TokenEngine, held: DocumentState) -> None:
        self.engine = engine
        self.held = held
        self.end = held.sequence.mark()
        self._current: GenerationState | None = None

    @property
    def hands(self) -> Hands:
        """The engine's threads."""
        return self.engine.hands

    def return_to_end(self) -> None:
        """Drop questions and answers; this ends a stream that is still running."""
        self._current = None
        self.held.sequence.rewind(self.end)

    def return_to(self, tail: SequenceDelta) -> None:
        """Restore the sequence to its state when ``tail`` was copied."""
        self.return_to_end()
        put_back(self.held.sequence, self.end, tail)

    def extend_to(self, held: DocumentState) -> None:
        """Move the end of the document to the sequence's present end."""
        end = held.sequence.mark()
        self.held, self.end = held, end  # both or neither

    def stream(
        self, question: Question, sampling: SamplingConfig, then: Then | None = None
    ) -> TextStream[Answer]:
        """An answer from the sequence's present end; ``then`` is called once it is complete."""
        sequence = self.held.sequence
        if question.sources and sequence.far.index is None:
            raise InvalidOptionError(
                f"Under {sequence.policy.name} no key is far, so none is retrieved and an answer "
                "has no sources. Choose another --policy."
            )
        exact = question.reading == "exact"
        run = self.engine.new_run(sequence, sampling, exact_prompt=exact)
        self._current = run
        start = sequence.mark() if question.sources else None

        def finish(text: str) -> Answer:
            if then is not None:
                then(run, text)
            values = dataclasses.asdict(generation_of(run, text))
            passages = () if start is None else self._passages(start, question, run.token_ids)
            return Answer(**values, question=question.text, passages=passages)

        def abandon() -> None:
            if self._current is run:
                self.return_to_end()

        return TextStream(self.hands, self._pieces(run, question.ids), finish, abandon)

    def _pieces(self, run: GenerationState, ids: list[int]) -> Iterator[str]:
        pieces = self.engine.pieces(run, ids)
        while True:
            self._require_current(run)
            piece = next(pieces, None)
            self._require_current(run)  # a signal handler may ask in the middle of a step
            if piece is None:
                return
            yield piece

    def _require_current(self, run: GenerationState) -> None:
        if self._current is not run:
            raise EndedAnswerError(
                "This answer ended when the document was asked again. Read a stream to its end "
                "before the next question, or let `ask` do it."
            )

    def _passages(
        self, start: Mark, question: Question, token_ids: list[int]
    ) -> tuple[Passage, ...]:
        """The passages that an answer attended to, found by answering again from ``start``."""
        engine, sequence, prompt = self.engine, self.held.sequence, self.held.prompt
        sequence.rewind(start)
        # from the question's last token on: the first token of the answer was drawn after it
        stepped = [question.ids[-1], *token_ids[:-1]]
        first_step = sequence.tokens + len(question.ids) - 1
        if question.reading == "exact":
            engine.read_ids(sequence, question.ids[:-1], silent)
        else:
            stepped = [*question.ids[:-1], *stepped]
        trace = AttentionRecorder(sequence, self.end.tokens, first_step)
        sequence.far.tracer = trace
        with memory_errors():
            for token in stepped:
                ids = torch.tensor([token], device=engine.decoder.device)
                decode_step(engine.decoder, [sequence], ids)
        return best_passages(prompt.text, prompt.spans, trace.attention, question.sources)
