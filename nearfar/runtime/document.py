"""A document that was read once and is asked any number of questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nearfar.config import DEFAULT_SAMPLING, SamplingConfig
from nearfar.runtime.chat import DocumentPrompt
from nearfar.runtime.generation import Run, generation_of
from nearfar.runtime.progress import Progress
from nearfar.runtime.results import Answer, MemoryReport
from nearfar.runtime.sequence import Sequence
from nearfar.runtime.stream import TextStream

if TYPE_CHECKING:
    from nearfar.runtime.engine import Engine


class Document:
    """What an engine has read of one text. Every question starts again from its end."""

    def __init__(
        self, engine: Engine, prompt: DocumentPrompt, sequence: Sequence, progress: Progress
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._sequence = sequence
        self._current: Run | None = None
        self.prefill_seconds = engine.read_ids(sequence, prompt.prefix_ids, progress)
        self._end = sequence.mark()

    @property
    def sequence(self) -> Sequence:
        """What was read, and the question and answer that came last."""
        return self._sequence

    @property
    def tokens(self) -> int:
        """Tokens of the document, the words around it included."""
        return self._end.tokens

    def stream(
        self, question: str, sampling: SamplingConfig = DEFAULT_SAMPLING
    ) -> TextStream[Answer]:
        """Answer piece by piece. Asking again ends a stream that is still under way.

        The question itself is read with exact attention over all that the policy kept; the tokens
        of the answer go through the policy.
        """
        ids = self._prompt.question_ids(question)
        self._sequence.rewind(self._end)
        run = self._current = self._engine.new_run(self._sequence, sampling)

        def finish(text: str) -> Answer:
            values = dataclasses.asdict(generation_of(run, text))
            return Answer(**values, question=question)

        return TextStream(self._pieces(run, ids), finish)

    def ask(self, question: str, sampling: SamplingConfig = DEFAULT_SAMPLING) -> Answer:
        """The whole answer to ``question``."""
        return self.stream(question, sampling).result

    def memory_report(self) -> MemoryReport:
        """Bytes that this document holds, beside those of the weights."""
        return self._engine.report_of([self._sequence])

    def _pieces(self, run: Run, ids: list[int]) -> Iterator[str]:
        pieces = self._engine.pieces(run, ids)
        while self._current is run:  # looked at before every step, the first one too
            piece = next(pieces, None)
            if piece is None:
                return
            yield piece
        raise RuntimeError("This answer ended when the document was asked again.")
