"""Conversations: questions about a document, each of which sees the earlier turns.

The turns of a conversation follow the document in its sequence. They are also copied to a tail, so
that other questions can come between them, and so that a file can hold them: a few rows and no copy
of the document. If the chat template leaves thoughts out of past turns, a turn with a thought is
read again without it before the next question.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nearfar.config import DEFAULT_SAMPLING, SamplingConfig
from nearfar.errors import InvalidOptionError
from nearfar.results import Answer, Turn
from nearfar.runtime.engine.answering import Answerer, Question, QuestionMode
from nearfar.runtime.engine.generation import GenerationState
from nearfar.runtime.engine.stream import TextStream
from nearfar.runtime.engine.workplace import Hands, in_turn
from nearfar.runtime.memory.tail import SequenceDelta, delta_since
from nearfar.runtime.saved.container import Container
from nearfar.runtime.saved.conversation_file import (
    ConversationState,
    open_talk,
    read_conversation,
    write_conversation,
)
from nearfar.runtime.saved.replacing import conversation_place


@dataclass
class _LastQuestion:
    """The last question: it becomes a turn once its answer has a result."""

    stream: TextStream[Answer] | None = None
    talk: ConversationState | None = None  # including the question


class Conversation:
    """Made by `Document.conversation`. A question that fails or is cut off leaves no trace."""

    def __init__(self, answerer: Answerer, talk: ConversationState | None = None) -> None:
        self._answerer = answerer
        self._before = talk  # the last question
        self._asked = _LastQuestion()
        self._end = answerer.end

    @property
    def hands(self) -> Hands:
        """The engine's threads."""
        return self._answerer.hands

    @property
    def _talk(self) -> ConversationState | None:
        asked = self._asked
        answered = asked.stream is not None and asked.stream.is_whole
        return asked.talk if answered else self._before

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The questions with complete answers, and the answers."""
        talk = self._talk
        return () if talk is None else talk.turns

    @in_turn
    def stream(
        self,
        question: str,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        *,
        reading: QuestionMode = "exact",
        sources: int = 0,
    ) -> TextStream[Answer]:
        """Answer piece by piece; arguments as of `Document.stream`."""
        prompt, talk = self._answerer.held.prompt, self._talk
        if self._answerer.end is not self._end:
            raise InvalidOptionError(
                "The document was extended after this conversation began. Begin a new one."
            )
        if talk is None:
            ids = prompt.question_ids(question)
        else:
            ids = [*talk.pending_ids, *prompt.next_question_ids(question)]
        question_asked = Question(question, ids, reading, sources)
        start = self._return_to(talk)

        def then(run: GenerationState, text: str) -> None:
            asked.talk = self._gone_on(talk, start, run, Turn(question, text))

        asked = _LastQuestion()
        asked.stream = self._answerer.stream(question_asked, sampling, then)
        self._before, self._asked = talk, asked
        return asked.stream

    def _return_to(self, talk: ConversationState | None) -> SequenceDelta | None:
        """Return to the end of ``talk``, and copy that state if later answers may return to it."""
        if talk is not None:
            self._answerer.return_to(talk.tail)
            return talk.tail
        self._answerer.return_to_end()
        held = self._answerer.held
        return delta_since(held.sequence, self._end) if held.prompt.drops_thoughts else None

    def _gone_on(
        self,
        talk: ConversationState | None,
        start: SequenceDelta | None,
        run: GenerationState,
        turn: Turn,
    ) -> ConversationState:
        """``talk`` with a turn that ``run`` answered after ``start``."""
        held = self._answerer.held
        before, unread = ((), ()) if talk is None else (talk.turns, talk.pending_ids)
        if start is not None:
            said = held.prompt.tokenizer.decode(run.token_ids)
            shown = held.prompt.passed_turn_ids(turn.question, turn.answer, said, talk is None)
            if shown:
                return ConversationState((*before, turn), start, (*unread, *shown))
        # the last token was drawn and not read, unless it is a stop token
        pending = () if run.finish_reason == "stop" else tuple(run.token_ids[-1:])
        return ConversationState((*before, turn), delta_since(held.sequence, self._end), pending)

    @in_turn
    def ask(
        self,
        question: str,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        *,
        reading: QuestionMode = "exact",
        sources: int = 0,
    ) -> Answer:
        """The whole answer to ``question``; arguments as of `Document.stream`."""
        return self.stream(question, sampling, reading=reading, sources=sources).result

    @in_turn
    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the conversation to a file that `Document.conversation` can open.

        An existing file is replaced if it holds an earlier part of this conversation, or with
        ``overwrite``. Raises OutputNameError if ``path`` cannot be used, SavedDocumentError if
        writing fails, InvalidOptionError before the first answer.
        """
        talk, answerer = self._talk, self._answerer
        if talk is None:
            raise InvalidOptionError("Nothing was said yet, so there is no conversation to save.")
        held, model = answerer.held, answerer.engine.model
        answerer.return_to_end()
        target = conversation_place(path, talk.turns, held, model, overwrite)
        write_conversation(target, talk, held, model)


def open_conversation(saved: str | Path | Container, answerer: Answerer) -> Conversation:
    """The ``saved`` conversation about the document of ``answerer``."""
    answerer.return_to_end()
    container = saved if isinstance(saved, Container) else open_talk(Path(saved))
    talk = read_conversation(container, answerer.held, answerer.engine.model)
    return Conversation(answerer, talk)
