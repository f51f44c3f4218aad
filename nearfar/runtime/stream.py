"""An iterator of text that knows its result when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from nearfar.runtime.results import Generation

R = TypeVar("R", bound=Generation, covariant=True)


class TextStream(Generic[R]):
    """Pieces of text as they are generated; afterwards `result`."""

    def __init__(self, pieces: Iterator[str], finish: Callable[[str], R]) -> None:
        self._pieces = pieces
        self._finish = finish
        self._text: list[str] = []
        self._result: R | None = None

    def __iter__(self) -> TextStream[R]:
        return self

    def __next__(self) -> str:
        try:
            piece = next(self._pieces)
        except StopIteration:
            if self._result is None:
                self._result = self._finish("".join(self._text))
            raise
        self._text.append(piece)
        return piece

    @property
    def result(self) -> R:
        """The whole generation; what is not generated yet is generated first."""
        for _ in self:
            pass
        assert self._result is not None
        return self._result
