"""Tokens with a name of their own: which ones the files of a tokenizer add, and what ends a turn.

This module reads the content of a tokenizer.json and a tokenizer_config.json; it encodes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import tokenizers

from nearfar.errors import InvalidOptionError, UnsupportedModelError
from nearfar.runtime.text.templates import ChatTemplate

END_TOKENS = (  # names that end a turn or an answer, even if a file does not say so
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|return|>",
    "<end_of_turn>",
    "<turn|>",
    "<end_of_utterance>",
    "<EOT>",
    "[EOT]",
    "</s>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
)


def marks_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The control tokens that ``settings`` name, `bos_token` for one.

    Raises ValueError for one that is neither a text nor an object with one as its `content`.
    """
    marks = {}
    for name, value in settings.items():
        named = name.endswith("_token") and not name.startswith(("add_", "split_"))
        if not named or not value:
            continue
        spelling = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(spelling, str):
            raise ValueError(f"{name!r} must be the text of a token. Got {value!r}.")
        marks[name] = spelling
    return marks


def named_tokens(
    settings: Mapping[str, Any], definition: Mapping[str, Any]
) -> list[tokenizers.AddedToken]:
    """Tokens that the settings name and the definition has not added, as transformers adds them."""
    there = {token["content"] for token in definition.get("added_tokens") or ()}
    found: dict[str, tokenizers.AddedToken] = {}
    listed = settings.get("added_tokens_decoder") or {}
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if token["content"] not in there:
            found[token["content"]] = tokenizers.AddedToken(
                **{key: value for key, value in token.items() if key != "__type"}
            )
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    more = [value.get("content") if isinstance(value, Mapping) else value for value in extra]
    for spelling in [*marks_of(settings).values(), *more]:
        if isinstance(spelling, str) and spelling not in there:
            found.setdefault(spelling, tokenizers.AddedToken(spelling, special=True))
    return list(found.values())


def turn_ends(template: ChatTemplate | None, added: Iterable[str], bos: str | None) -> list[str]:
    """The tokens of ``added`` that ``template`` writes after an assistant's text.

    The model was trained to write them there. Templates that are broken, or refuse such a
    conversation, give none; they raise an error when they are used.
    """
    if template is None:
        return []
    found = []
    longest_first = sorted(added, key=len, reverse=True)
    for roles in (("user", "assistant"), ("user", "assistant", "user")):
        with suppress(InvalidOptionError, UnsupportedModelError):
            behind = template.around(roles, answer=False)[2].lstrip()
            found += [name for name in longest_first if behind.startswith(name)][:1]
    return [name for name in found if name != bos]
