"""Prompts in the form of a model's chat template.

This module knows templates as strings around messages, and tokenizers as something that encodes
parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import DocumentError, InvalidOptionError, UnsupportedModelError
from nearfar.runtime.text.text_origins import Text, joined
from nearfar.runtime.text.thoughts import MARKS
from nearfar.runtime.text.tokenizer import Part, Tokenizer
from nearfar.runtime.text.unicode_text import check_unicode

INSTRUCTION = "Read the following text carefully. You will be asked questions about it."
JOINT = "\n\n"  # between texts
_SAMPLE_QUESTION = "What"


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a prompt that ends where the assistant's answer starts.

    ``messages`` have a ``role`` (system, user, assistant) and a ``content``. Raises
    UnsupportedModelError where the model has no chat template or a broken one,
    InvalidOptionError where the template refuses the messages.
    """
    return tokenizer.encode_parts(_parts(tokenizer, messages))


def prompt_ids(tokenizer: Tokenizer, prompt: str | list[int], chat: bool) -> list[int]:
    """Ids of a prompt to continue or, with ``chat``, to answer; raises as `chat_ids` does.

    Ids stay as they are.
    """
    if chat and isinstance(prompt, str):
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    ids = tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
    if not ids:
        raise InvalidOptionError("A prompt must not be empty.")
    return ids


class ContextPrompt:
    """A context once, and any number of questions that each follow it in the user's turn.

    ``prefix_ids`` are the part of the prompt that does not depend on a question: the context
    without its last characters, if the tokenizer may join these with the question. ``following`` is
    the start of every question. No word is added to either; without a chat template nothing
    surrounds them.
    """

    def __init__(self, tokenizer: Tokenizer, context: str, following: str) -> None:
        self._tokenizer = tokenizer
        self._tail: list[Part] = []
        before, opening_ids = [Part(context)], tokenizer.opening_ids
        if tokenizer.chat_template is not None:
            head, _, tail = _parts(tokenizer, [{"role": "user", "content": ""}])
            self._tail, before, opening_ids = [tail], [head, Part(context)], []
        ids, self._rest, _ = tokenizer.encode_open(before, following)
        self.prefix_ids = opening_ids + ids

    def question_ids(self, question: str, opening: str = "") -> list[int]:
        """Ids that follow the prefix: ``question``, and ``opening``, with which the answer starts.

        Generation continues after ``opening``.
        """
        parts = [Part(self._rest + question), *self._tail, Part(opening)]
        return self._tokenizer.encode_parts(parts, continues=True)


class DocumentPrompt:
    """A document once, and any number of questions that each follow it.

    ``prefix_ids`` are the part of the prompt that does not depend on a question: the document
    without its last characters, ``rest``, if the tokenizer may join these with the question.
    ``spans`` [tokens, 2] int32 are the characters of ``text`` for each token, empty for words
    around it. With a chat template, the user's turn is an instruction, the document and the
    question.
    """

    tokenizer: Tokenizer
    text: Text
    prefix_ids: list[int]
    spans: NDArray[np.int32]
    rest: str

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._set_tokenizer(tokenizer)
        self.text = Text(text).stripped()
        head, opening_ids = Part(""), tokenizer.opening_ids
        if tokenizer.chat_template is not None:
            head, opening_ids = _parts(tokenizer, [{"role": "user", "content": ""}])[0], []
            head = Part(f"{head.text}{INSTRUCTION}\n\n", trusted=True)
        opened = tokenizer.encode_open([head, Part(self.text)], self._sample)
        self.prefix_ids = opening_ids + opened.ids
        self.spans = _text_spans([(0, 0)] * len(opening_ids) + opened.spans, -len(head.text))
        self.rest = opened.rest

    @classmethod
    def restored(
        cls, tokenizer: Tokenizer, text: Text, ids: list[int], spans: NDArray[np.int32], rest: str
    ) -> DocumentPrompt:
        """The prompt that once had these values, with an equal tokenizer."""
        prompt = cls.__new__(cls)
        prompt._set_tokenizer(tokenizer)
        prompt.text, prompt.prefix_ids, prompt.spans, prompt.rest = text, ids, spans, rest
        return prompt

    def extended(self, text: str) -> DocumentPrompt:
        """The prompt with more text after an empty line; its ids begin with those of this prompt.

        Only the new text is encoded: the earlier tokens need not be read again.
        """
        check_unicode(text, "The text")
        more = joined([JOINT, Text(text).stripped()])
        opened = self.tokenizer.encode_open([Part(self.rest + more)], self._sample, continues=True)
        new_spans = _text_spans(opened.spans, len(self.text) - len(self.rest))
        return self.restored(
            self.tokenizer,
            joined([self.text, more]),
            self.prefix_ids + opened.ids,
            np.concatenate([self.spans, new_spans]),
            opened.rest,
        )

    def question_ids(self, question: str) -> list[int]:
        """Ids that follow the prefix, up to where the answer starts."""
        _check_question(question)
        before, after = self._around_question
        parts = [Part(self.rest + before + question.strip()), after]
        return self.tokenizer.encode_parts(parts, continues=True)

    def next_question_ids(self, question: str) -> list[int]:
        """Ids that follow an answer, less its stop token, up to where the next answer starts."""
        _check_question(question)
        if self.tokenizer.chat_template is None:
            before, after = Part(self._around_question[0]), self._around_question[1]
        else:
            roles = ("user", "assistant", "user")
            parts = _parts(self.tokenizer, [{"role": role, "content": ""} for role in roles])
            before, after = parts[4], parts[6]
        parts = [before, Part(question.strip()), after]
        return self.tokenizer.encode_parts(parts, continues=True)

    @cached_property
    def drops_thoughts(self) -> bool:
        """Whether the template leaves thoughts out of turns that have passed."""
        template = self.tokenizer.template
        with suppress(InvalidOptionError, UnsupportedModelError):
            return template is not None and not all(
                template.keeps_thoughts(*pair) for pair in MARKS
            )
        return False

    def passed_turn_ids(self, question: str, answer: str, said: str, first: bool) -> list[int]:
        """Ids of a turn as the template shows it once the conversation has gone on.

        ``said`` is the whole generated text, ``answer`` its part without thoughts; ``first`` tells
        whether the turn followed the document. Empty if the tokens that were read need no change:
        the template keeps thoughts, or the turn has no thought and no mark of one.
        """
        if not self.drops_thoughts:
            return []
        roles = ("user", "assistant", "user", "assistant", "user")
        parts = _parts(self.tokenizer, [{"role": role, "content": ""} for role in roles])
        before = Part(self.rest + self._around_question[0]) if first else parts[4]
        behind = parts[2] if first else parts[6]
        if said.strip() == answer.strip() and behind == self._around_question[1]:
            return []
        shown = [before, Part(question.strip()), behind, Part(answer.strip())]
        return self.tokenizer.encode_parts(shown, continues=True)

    def _set_tokenizer(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            self._around_question = ("\n\nQuestion: ", Part("\nAnswer:", trusted=True))
        else:
            tail = _parts(tokenizer, [{"role": "user", "content": ""}])[2]
            self._around_question = ("\n\n", tail)
        self._sample = self._around_question[0] + _SAMPLE_QUESTION


def _check_question(question: str) -> None:
    if not question.strip():
        raise InvalidOptionError("The question is empty. Ask one with text.")
    check_unicode(question, "The question")


def document_prompt(tokenizer: Tokenizer, text: str | DocumentPrompt) -> DocumentPrompt:
    """``text`` as a document; one that is tokenized stays as it is.

    Raises DocumentError where there is no text, InvalidOptionError where another tokenizer made it.
    """
    characters = text.text if isinstance(text, DocumentPrompt) else text
    if not characters.strip():
        raise DocumentError("The document has no text. Give one with text.")
    if not isinstance(text, DocumentPrompt):
        return DocumentPrompt(tokenizer, text)
    if text.tokenizer.identity != tokenizer.identity:
        raise InvalidOptionError(
            "The document was tokenized for another model, or with other --thinking. Give its text."
        )
    return text


def _text_spans(spans: Sequence[tuple[int, int]], shift: int) -> NDArray[np.int32]:
    """``spans`` moved by ``shift``, as characters of the text; empty for characters before it."""
    moved: NDArray[np.int32] = np.array(spans, np.int32).reshape(-1, 2) + np.int32(shift)
    return np.where(moved[:, 1:] > 0, np.maximum(moved, 0), 0).astype(np.int32)


def _parts(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[Part]:
    """The rendered template, trusted, around the stripped contents, which are not."""
    if tokenizer.template is None:
        raise UnsupportedModelError(
            "The model has no chat template, so it cannot be given a conversation. "
            "Give the prompt as plain text, or choose an instruct model."
        )
    first, *rest = tokenizer.template.around([message["role"] for message in messages])
    parts = [Part(first, trusted=True)]
    for message, after in zip(messages, rest, strict=True):
        parts += [Part(message["content"].strip()), Part(after, trusted=True)]
    return parts
