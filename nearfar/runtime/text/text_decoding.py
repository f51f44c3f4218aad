"""Text of token ids that come one by one, equal in sum to the text of all of them.

The text of a token can depend on later tokens: a character may be spread over several tokens, and
if a run of byte tokens is not valid UTF-8, each of them becomes U+FFFD. So text is held back until
no later token can change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what bytes that are no UTF-8 become; more bytes may make them a character


class StreamDecoder:
    """Pieces of text that join to what ``decode`` says of all ids.

    ``says_nothing`` tells which ids have no text, ``may_change`` after which ids the text can still
    change.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        says_nothing: Callable[[int], bool],
        may_change: Callable[[int], bool],
    ) -> None:
        self._decode, self._says_nothing, self._may_change = decode, says_nothing, may_change
        self._ids: list[int] = []  # the last one that was said, and those after it
        self._said = 0  # characters of their text

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` settles; empty inside a character and for control tokens."""
        if self._says_nothing(token_id):
            return ""
        self._ids.append(token_id)
        if self._may_change(token_id):
            return ""
        text = self._decode(self._ids)
        piece = self._new(text, len(text.rstrip(_REPLACEMENT)))
        if self._said == len(text):
            # a tokenizer may strip a space from the start of a text, so a token before stays
            self._ids = self._ids[-1:]
            self._said = len(self._decode(self._ids))
        return piece

    def finish(self) -> str:
        """The text that was held back, now that no token follows."""
        text = self._decode(self._ids)
        return self._new(text, len(text))

    def _new(self, text: str, end: int) -> str:
        piece = text[self._said : end]
        self._said = max(self._said, end)
        return piece
