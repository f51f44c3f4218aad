"""A document that is read once and answers any number of questions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nearfar.config import DEFAULT_SAMPLING, SamplingConfig
from nearfar.errors import DocumentError
from nearfar.progress import Progress, silent
from nearfar.results import Answer, MemoryReport
from nearfar.runtime.engine.accounting import memory_errors
from nearfar.runtime.engine.answering import Answerer, Question, QuestionMode
from nearfar.runtime.engine.conversation import Conversation, open_conversation
from nearfar.runtime.engine.generation import check_room
from nearfar.runtime.engine.stream import TextStream
from nearfar.runtime.engine.token_engine import TokenEngine
from nearfar.runtime.engine.workplace import Hands, in_turn
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.saved.container import Container
from nearfar.runtime.saved.document_state import DocumentState
from nearfar.runtime.saved.replacing import document_place
from nearfar.runtime.saved.write_document import write_document
from nearfar.runtime.text.text_origins import Text


class Document:
    """A text that an engine has read. Every question starts from its end.

    Every operation on a document ends a stream of it that is still running. Threads may share a
    document: each operation, or each piece of a stream, is completed before another thread's turn.
    """

    def __init__(self, engine: TokenEngine, held: DocumentState) -> None:
        self._answerer = Answerer(engine, held)

    @property
    def hands(self) -> Hands:
        """The engine's threads."""
        return self._answerer.hands

    @property
    def sequence(self) -> Sequence:
        """The sequence of the document, with the last question and answer."""
        return self._held.sequence

    @property
    def tokens(self) -> int:
        """Tokens of the document, including those of the chat template."""
        return self._answerer.end.tokens

    @property
    def prefill_seconds(self) -> float:
        """Seconds that prefill took, even if the document was then saved and opened again."""
        return self._held.read_seconds

    @property
    def was_opened(self) -> bool:
        """Whether the document comes from a file."""
        return self._held.container is not None

    @property
    def index_is_new(self) -> bool:
        """Whether the policy's index was built here and does not come from the document's file."""
        return self._held.index_is_new

    @in_turn
    def stream(
        self,
        question: str,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        *,
        reading: QuestionMode = "exact",
        sources: int = 0,
    ) -> TextStream[Answer]:
        """Answer piece by piece.

        The question attends to all rows that the policy kept or, if ``reading`` is "policy", to
        the rows that the policy selects for each token. The tokens of the answer always attend
        through the policy. With ``sources`` above 0 the answer names that many passages that it
        attended to; this takes about twice the time and does not change the answer.
        """
        ids = self._held.prompt.question_ids(question)
        asked = Question(question, ids, reading, sources)
        self._answerer.return_to_end()
        return self._answerer.stream(asked, sampling)

    @in_turn
    def ask(
        self,
        question: str,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        *,
        reading: QuestionMode = "exact",
        sources: int = 0,
    ) -> Answer:
        """The whole answer to ``question``; arguments as of `stream`."""
        return self.stream(question, sampling, reading=reading, sources=sources).result

    @in_turn
    def conversation(self, path: str | Path | Container | None = None) -> Conversation:
        """A conversation, whose questions see the earlier turns; ``path`` continues a saved one.

        ``path`` may also be the file as `open_session` opened it.

        Raises SavedDocumentError if the saved conversation is about another document.
        """
        if path is None:
            return Conversation(self._answerer)
        return open_conversation(path, self._answerer)

    @in_turn
    def extend(self, text: str, *, progress: Progress = silent) -> None:
        """Append ``text`` to the document, after an empty line.

        The first part is not read again. Raises like `Engine.read`; the document is then unchanged.
        """
        if not text.strip():
            raise DocumentError("There is no text to read behind the document. Give some.")
        self._answerer.return_to_end()
        engine, held = self._answerer.engine, self._held
        prompt = held.prompt.extended(text)
        ids = prompt.prefix_ids[self.tokens :]
        check_room(engine.decoder, held.sequence.next_position, len(ids))
        engine.room.check_extended(self.tokens, len(prompt.prefix_ids))
        try:
            seconds = engine.read_ids(held.sequence, ids, progress)
        except BaseException:
            self._answerer.return_to_end()
            raise
        self._answerer.extend_to(DocumentState(prompt, held.sequence, held.read_seconds + seconds))

    @in_turn
    def save(self, path: str | Path, *, overwrite: bool = False, made_from: str = "") -> None:
        """Write the document to a file that `Engine.open` opens at once.

        The file appears as a whole or not at all. An existing file is replaced if it is an earlier
        form of this document, or with ``overwrite``. ``made_from`` is for `nearfar index`. Raises
        OutputNameError if ``path`` cannot be used, and SavedDocumentError if writing fails.
        """
        self._answerer.return_to_end()
        held, model = self._held, self._answerer.engine.model
        self._write(document_place(path, held, model, overwrite), made_from, private=False)

    @in_turn
    def write(self, path: Path, *, private: bool) -> None:
        """Like `save`, but replaces any file; only the owner can read a ``private`` file."""
        self._answerer.return_to_end()
        self._write(path, "", private)

    def _write(self, path: Path, made_from: str, private: bool) -> None:
        model = self._answerer.engine.model
        with memory_errors():
            write_document(path, self._held, model, made_from=made_from, private=private)

    def name_sources(self, text: Text) -> None:
        """Name passages by the sources of ``text``, which is the document's text."""
        held = self._held
        same = text.stripped()
        if same == held.prompt.text:
            prompt = held.prompt
            prompt = prompt.restored(
                prompt.tokenizer, same, prompt.prefix_ids, prompt.spans, prompt.rest
            )
            self._answerer.held = dataclasses.replace(held, prompt=prompt)

    @in_turn
    def memory_report(self) -> MemoryReport:
        """Bytes of this document and of the weights."""
        return self._answerer.engine.report_of([self._held.sequence])

    @property
    def _held(self) -> DocumentState:
        return self._answerer.held
