"""The places of control tokens in a text that a program wrote.

The stretch of a text that is one depends on how the token was added: it may include blanks, match
only a whole word, or match only the normalised text. The encoding library finds them, with a
vocabulary of these tokens alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers

_NO_WORDS = {"type": "BPE", "vocab": {}, "merges": []}


class Found(NamedTuple):
    """A control token in a text, from ``start`` to ``stop``, with the blanks that it includes."""

    start: int
    stop: int
    token_id: int


class ControlTokens:
    """The control tokens among those that ``tokenizer`` has added.

    ``definition`` is the content of its tokenizer.json.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, definition: Mapping[str, Any]) -> None:
        added = sorted(tokenizer.get_added_tokens_decoder().items())
        bare: dict[str, Any] = {
            "added_tokens": [],
            "model": _NO_WORDS,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": None,
            "truncation": None,
            "padding": None,
        }
        self._finder = tokenizers.Tokenizer.from_str(json.dumps({**definition, **bare}))
        # the others too, as one of them may take a place first
        self._finder.add_tokens([token for _, token in added])
        own = {token.content: i for i, token in self._finder.get_added_tokens_decoder().items()}
        self._ids = {own[token.content]: i for i, token in added if token.special}

    def find(self, text: str) -> Iterator[Found]:
        """Those in ``text``, from its start on."""
        if not self._ids:
            return
        encoding = self._finder.encode(text, add_special_tokens=False)
        for own, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if own in self._ids:
                yield Found(start, stop, self._ids[own])
