"""An iterator of text with a result at its end, or an error that says why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

from nearfar.errors import EndedAnswerError
from nearfar.results import Generation
from nearfar.runtime.engine.workplace import Hands, in_turn

R = TypeVar("R", bound=Generation, covariant=True)


class TextStream(Generic[R]):
    """Pieces of text as they are generated; afterwards `result`.

    A stream that failed, was closed or was interrupted has no result and raises the reason every
    time. Nothing is computed between two pieces, so a half-read stream does not block others.
    """

    def __init__(
        self,
        hands: Hands,
        pieces: Iterator[str],
        finish: Callable[[str], R],
        abandon: Callable[[], None],
    ) -> None:
        """``finish`` makes the result of the whole text; ``abandon`` discards an unfinished one."""
        self.hands = hands
        self._pieces = pieces
        self._finish = finish
        self._abandon = abandon
        self._text: list[str] = []
        self._result: R | None = None
        self._failure: Exception | None = None

    def __iter__(self) -> TextStream[R]:
        return self

    def __next__(self) -> str:
        piece = self._advance()
        if piece is None:
            raise StopIteration
        return piece

    @property
    def is_whole(self) -> bool:
        """Whether the stream has ended with a result."""
        return self._result is not None

    @property
    def result(self) -> R:
        """The whole generation; generates the rest first if the stream has not ended."""
        return self.hands.run(self._read_to_the_end)

    @in_turn
    def close(self) -> None:
        """End the answer without a result; no effect if it is complete or has failed."""
        if self._result is None and self._failure is None:
            self._failure = _ended("was closed before its end")
            self._abandon()

    def _read_to_the_end(self) -> R:
        while self._advance() is not None:
            pass
        assert self._result is not None
        return self._result

    @in_turn
    def _advance(self) -> str | None:
        """The next piece; None once there is a result."""
        if self._result is not None:
            return None
        if self._failure is not None:
            raise self._failure
        # remains if an interrupt comes at any later moment
        self._failure = _ended("was interrupted before its end")
        try:
            piece = next(self._pieces, None)
            if piece is None:
                result = self._finish("".join(self._text))
                # no interrupt can come between these two: neither calls a function
                self._result, self._failure = result, None
                return None
            self._text.append(piece)
        except BaseException as error:
            if isinstance(error, Exception):
                self._failure = error
            with suppress(Exception):  # the first error is the cause
                self._abandon()
            raise
        self._failure = None
        return piece


def _ended(how: str) -> EndedAnswerError:
    return EndedAnswerError(f"This answer {how}, so it has no result. Ask again.")
