"""A document that was read once and is asked any number of questions."""

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
    """What an engine has read of one text. Every question starts again from its end.

    Whatever is done with a document ends a stream of it that is still under way. Threads may share
    it: what one of them does is done whole before another's turn comes, but for streams, of which a
    piece is.
    """

    def __init__(self, engine: TokenEngine, held: DocumentState) -> None:
        self._answerer = Answerer(engine, held)

    @property
    def hands(self) -> Hands:
        """Of the engine."""
        return self._answerer.hands

    @property
    def sequence(self) -> Sequence:
        """What was read, and the question and answer that came last."""
        return self._held.sequence

    @property
    def tokens(self) -> int:
        """Tokens of the document, the words around it included."""
        return self._answerer.end.tokens

    @property
    def prefill_seconds(self) -> float:
        """What reading took; of a document that was opened, when it was read."""
        return self._held.read_seconds

    @property
    def was_opened(self) -> bool:
        """Whether it comes from a file and was not read here."""
        return self._held.container is not None

    @property
    def index_is_new(self) -> bool:
        """Whether the policy's index was made and is not in the file that the document is from."""
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

        The question is read with exact attention over all that the policy kept, or, if ``reading``
        is "policy", over what it selects for each token; the tokens of the answer always go through
        the policy. The answer names ``sources`` passages that it attended to, which takes about
        twice the time; it is the same with and without.
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
        """Questions of which each sees the ones before it; ``path`` goes on with a saved one.

        It may also be the file as `open_session` opened it.

        Raises SavedDocumentError for one about another document.
        """
        if path is None:
            return Conversation(self._answerer)
        return open_conversation(path, self._answerer)

    @in_turn
    def extend(self, text: str, *, progress: Progress = silent) -> None:
        """Read more text behind what was read, an empty line between them.

        The first part is not read again. Raises as `Engine.read` does, and the document is then as
        it was.
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

        The file appears whole or not at all. One that is there is replaced if it is an earlier form
        of this document, or with ``overwrite``. ``made_from`` is for `nearfar index`. Raises
        OutputNameError where ``path`` cannot be used, and SavedDocumentError where writing fails.
        """
        self._answerer.return_to_end()
        held, model = self._held, self._answerer.engine.model
        self._write(document_place(path, held, model, overwrite), made_from, private=False)

    @in_turn
    def write(self, path: Path, *, private: bool) -> None:
        """As `save`, in the place of whatever is there; nobody else can read a ``private`` file."""
        self._answerer.return_to_end()
        self._write(path, "", private)

    def _write(self, path: Path, made_from: str, private: bool) -> None:
        model = self._answerer.engine.model
        with memory_errors():
            write_document(path, self._held, model, made_from=made_from, private=private)

    def name_sources(self, text: Text) -> None:
        """Let passages be named by the sources of ``text``, which is the document's."""
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
        """Bytes that this document holds, beside those of the weights."""
        return self._answerer.engine.report_of([self._held.sequence])

    @property
    def _held(self) -> DocumentState:
        return self._answerer.held
