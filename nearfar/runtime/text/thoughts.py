"""Separates thoughts from answers, in text that comes piece by piece.

Models that think write their thought between two marks before the answer; with some, the prompt
ends with the first mark. This module knows text alone: a mark may come in any number of pieces.
"""

from __future__ import annotations

MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)


def opened_by(prompt: str) -> str | None:
    """The mark that ends a thought which ``prompt`` has begun; None where it has begun none."""
    for opening, closing in MARKS:
        if prompt.rfind(opening) > prompt.rfind(closing):
            return closing
    return None


class ThoughtSplitter:
    """Parts pieces of text into thought and answer.

    ``closing`` is the mark of a thought that the prompt has begun. A thought comes before the
    answer, blanks aside; the same marks inside an answer are text.
    """

    def __init__(self, closing: str | None = None) -> None:
        self._closing = closing
        self._answering = False
        self._after_thought = False
        self._held = ""

    @property
    def in_thought(self) -> bool:
        """Whether a thought was begun and not ended."""
        return self._closing is not None

    def push(self, piece: str) -> tuple[str, str]:
        """The parts of ``piece`` that are known to belong to the thought and to the answer."""
        self._held += piece
        thought = ""
        while not self._answering:
            if self._closing is not None:
                before, found, after = self._held.partition(self._closing)
                if not found:
                    keep = _common_end(self._held, self._closing)
                    thought += self._held[: len(self._held) - keep]
                    self._held = self._held[len(self._held) - keep :]
                    return thought, ""
                thought, self._held = thought + before, after
                self._closing, self._after_thought = None, True
            start = self._held.lstrip()
            opened = [pair for pair in MARKS if start.startswith(pair[0])]
            if opened:
                self._closing, self._held = opened[0][1], start[len(opened[0][0]) :]
            elif not start or any(mark.startswith(start) for mark, _ in MARKS):
                return thought, ""
            else:
                self._answering = True
        return thought, self._release()

    def finish(self) -> tuple[str, str]:
        """The text that was held back, now that nothing follows."""
        if self._closing is not None:
            thought, self._held = self._held, ""
            return thought, ""
        self._answering = True
        return "", self._release()

    def _release(self) -> str:
        answer, self._held = self._held, ""
        if self._after_thought:  # the blanks between the two belong to neither
            answer = answer.lstrip()
            self._after_thought = False
        return answer


def _common_end(text: str, mark: str) -> int:
    """Characters at the end of ``text`` that may be the start of ``mark``."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


def answer_of(text: str, closing: str | None = None) -> str:
    """The answer alone, of the whole ``text`` of one."""
    splitter = ThoughtSplitter(closing)
    return splitter.push(text)[1] + splitter.finish()[1]
