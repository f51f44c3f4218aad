"""Text to token ids and back, with control tokens only in trusted text.

A control token (`<|im_end|>`) is recognised in text that a program wrote, such as a chat template,
and never in text from outside: there it is encoded as ordinary characters. Files are read by
`nearfar.runtime.checkpoints.tokenizer_files`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import tokenizers

from nearfar.errors import InvalidOptionError, UnsupportedModelError
from nearfar.runtime.text.control_tokens import ControlTokens
from nearfar.runtime.text.prefix_space import without_prefix_space
from nearfar.runtime.text.special_tokens import END_TOKENS, marks_of, named_tokens, turn_ends
from nearfar.runtime.text.templates import ChatTemplate
from nearfar.runtime.text.text_decoding import StreamDecoder
from nearfar.runtime.text.thoughts import MARKS, opened_by
from nearfar.runtime.text.unicode_text import check_unicode

_IDS = 2**32  # what the library takes as an id
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MOST_OPEN_TOKENS = 16  # at the end of a text, that what follows could change


class Part(NamedTuple):
    """A stretch of text; control tokens are recognised only in a trusted one."""

    text: str
    trusted: bool = False


class OpenText(NamedTuple):
    """The result of `Tokenizer.encode_open` for a text that goes on."""

    ids: list[int]
    rest: str  # the end that is not in them
    spans: list[tuple[int, int]]  # of each id, its characters in the joined parts


class _Run(NamedTuple):
    """A control token, or text without any and what is before it."""

    content: int | str
    after: Literal["nothing", "control", "text"]


class Tokenizer:
    """A model's tokenizer.

    ``definition`` is the content of a tokenizer.json, ``settings`` that of a tokenizer_config.json.
    ``marks`` are the control tokens that chat templates may name, `bos_token` for one;
    ``eos_token_ids`` end an answer. Tokenizers of the same ``identity``, a sha256 in hex, give the
    same prompts.
    """

    def __init__(
        self,
        definition: str,
        settings: Mapping[str, Any],
        chat_template: str | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        described = json.dumps([definition, dict(settings), chat_template], sort_keys=True)
        self.identity = hashlib.sha256(described.encode()).hexdigest()
        self._untold = self  # without what `with_thinking` tells the template
        self.marks = marks_of(settings)
        template = None if chat_template is None else ChatTemplate(chat_template, self.marks)
        self.template = template
        parsed = json.loads(definition)
        _check_decoding(settings, parsed)
        named = named_tokens(settings, parsed)
        self._first = _load(definition, named)
        inner, self._spaced_after_control = without_prefix_space(parsed)
        self._inner = self._first if inner is None else _load(json.dumps(inner), named)
        added = self._first.get_added_tokens_decoder()
        self._added = {token.content: i for i, token in added.items()}
        # marks of a thought are text also where a file calls them control tokens
        marks = {each for pair in MARKS for each in pair}
        self._control_ids = frozenset(
            i for i, token in added.items() if token.special and token.content not in marks
        )
        self._joins_bytes = '"ByteFallback"' in json.dumps(parsed.get("decoder"))
        self._control_tokens = ControlTokens(self._first, parsed)
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *self._ends()]))
        self.opening_ids = self._opening_ids()

    @property
    def chat_template(self) -> str | None:
        """The source of `template`."""
        return None if self.template is None else self.template.source

    def with_thinking(self, thinking: bool | None) -> Tokenizer:
        """The same with a chat template that switches thinking on or off.

        None passes nothing to it. Raises InvalidOptionError for a template with no such switch.
        """
        untold = self._untold
        if thinking is None:
            return untold
        if untold.template is None:
            raise InvalidOptionError(
                "The model has no chat template, so thinking can be turned neither on nor off. "
                "Leave --thinking and --no-thinking out."
            )
        untold.template.require_switch()
        changed = copy.copy(untold)
        changed.template = ChatTemplate(untold.template.source, self.marks, thinking)
        before = [template.around(["user"])[0] for template in (untold.template, changed.template)]
        if before[0] != before[1]:  # a document is read after it
            described = f"{untold.identity} {before[1]}"
            changed.identity = hashlib.sha256(described.encode()).hexdigest()
        return changed

    def options_of(self, identity: str) -> str | None:
        """The options that give this tokenizer ``identity``; None if none do."""
        options: dict[bool | None, str] = {
            None: "neither --thinking nor --no-thinking",
            True: "--thinking",
            False: "--no-thinking",
        }
        with suppress(InvalidOptionError, UnsupportedModelError):
            for thinking, words in options.items():
                if self.with_thinking(thinking).identity == identity:
                    return words
        return None

    def thought_of_prompt(self) -> str | None:
        """The mark that ends a thought which the chat template begins itself; None for none."""
        if self.template is None:
            return None
        with suppress(InvalidOptionError, UnsupportedModelError):
            return opened_by(self.template.around(["user"])[1])
        return None

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self._first.get_vocab_size())

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of ``text``, in which control tokens are recognised.

        ``add_special_tokens`` puts before it what the model expects at the start of a text.
        """
        ids = self.encode_parts([Part(text, trusted=True)])
        return self.opening_ids + ids if add_special_tokens else ids

    def encode_parts(self, parts: Iterable[Part], continues: bool = False) -> list[int]:
        """Ids of the joined ``parts``, encoded as one text.

        ``continues``: they continue a text that was encoded before.
        """
        ids: list[int] = []
        for run in self._runs(parts, continues):
            ids += [run.content] if isinstance(run.content, int) else self._encoding(run).ids
        return ids

    def encode_open(self, parts: Sequence[Part], sample: str, continues: bool = False) -> OpenText:
        """Ids of ``parts`` to which more text will be added, and the end that is not in them.

        Tokenizers join the end of a text with what follows: to some, a full stop and two line
        breaks are one token. ``sample`` is text of the kind that follows. The end that is left out,
        put before it, makes the ids the same as if all had been encoded at once. Spans are those of
        the text after the last control token; ids before it have the empty span (0, 0).
        """
        *runs, last = self._runs(parts, continues)
        ids: list[int] = []
        for run in runs:
            ids += [run.content] if isinstance(run.content, int) else self._encoding(run).ids
        before = [(0, 0)] * len(ids)
        if isinstance(last.content, int):
            return OpenText([*ids, last.content], "", [*before, (0, 0)])
        start = sum(len(part.text) for part in parts) - len(last.content)
        whole = self._encoding(_Run(last.content + sample, last.after))
        for cut in range(len(whole.ids), max(0, len(whole.ids) - _MOST_OPEN_TOKENS), -1):
            end = whole.offsets[cut - 1][1]
            following = _Run(last.content[end:] + sample, "text")
            if end <= len(last.content) and self._encoding(following).ids == whole.ids[cut:]:
                own = [(start + a, start + b) for a, b in whole.offsets[:cut]]
                return OpenText(ids + whole.ids[:cut], last.content[end:], before + own)
        closed = self._encoding(last)
        own = [(start + a, start + b) for a, b in closed.offsets]
        return OpenText(ids + closed.ids, "", before + own)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD.

        Ids without a token have no text: a model may have more rows than its tokenizer has tokens.
        """
        known = [i for i in ids if 0 <= i < _IDS]
        if skip_special_tokens:
            known = [i for i in known if i not in self._control_ids]
        text: str = self._first.decode(known, skip_special_tokens=False)
        return text

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one by one; its pieces join to what `decode` says."""
        return StreamDecoder(self.decode, self._says_nothing, self._is_byte)

    def _says_nothing(self, token_id: int) -> bool:
        return token_id in self._control_ids or not self._spelling_of(token_id)

    def _is_byte(self, token_id: int) -> bool:
        """Whether the token is a byte, which becomes text only together with its neighbours."""
        return self._joins_bytes and _BYTE.fullmatch(self._spelling_of(token_id)) is not None

    def _spelling_of(self, token_id: int) -> str:
        """The token as the vocabulary has it; empty where there is none."""
        return (self._first.id_to_token(token_id) or "") if 0 <= token_id < _IDS else ""

    def _runs(self, parts: Iterable[Part], continues: bool) -> list[_Run]:
        """``parts`` cut at their control tokens; text on both sides of a seam is joined."""
        contents: list[int | str] = [""]
        for text, trusted in parts:
            check_unicode(text, "The text")
            end = 0
            for found in self._control_tokens.find(text) if trusted else ():
                contents[-1] = f"{contents[-1]}{text[end : found.start]}"
                contents += [found.token_id, ""]
                end = found.stop
            contents[-1] = f"{contents[-1]}{text[end:]}"
        runs = [_Run(contents[0], "text" if continues else "nothing")]
        runs += [_Run(content, "control") for content in contents[1:]]
        return [run for run in runs if run.content != ""] or runs[:1]

    def _encoding(self, run: _Run) -> tokenizers.Encoding:
        """Text encoded without control tokens, after a space where the tokenizer adds one."""
        first = run.after == "nothing" or (run.after == "control" and self._spaced_after_control)
        tokenizer = self._first if first else self._inner
        return tokenizer.encode(run.content, add_special_tokens=False)

    def _opening_ids(self) -> list[int]:
        """The ids that the file's post-processor puts before a text, as in transformers.

        The ids that it puts after a text are left out, because more text follows.
        """
        plain: list[int] = self._first.encode("a", add_special_tokens=False).ids
        marked: list[int] = self._first.encode("a", add_special_tokens=True).ids
        for start in range(len(marked)):
            if plain and marked[start : start + len(plain)] == plain:
                return marked[:start]
        return []

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the named one, the end of the turn, and known names."""
        end = self._first.token_to_id(self.marks.get("eos_token", ""))
        known = [self._added.get(name) for name in END_TOKENS]
        written = turn_ends(self.template, self._added, self.marks.get("bos_token"))
        ends = [end, *map(self._added.get, written), *known]
        return [i for i in ends if i is not None]


def _check_decoding(settings: Mapping[str, Any], definition: Mapping[str, Any]) -> None:
    """Raise for text that would be changed after it is decoded, as transformers does it."""
    name, forced = "clean_up_tokenization_spaces", "_for_bpe_even_though_it_will_corrupt_output"
    merges = definition["model"].get("type", "BPE") == "BPE"
    if settings.get(name) and (not merges or settings.get(name + forced)):
        raise UnsupportedModelError(
            f"The model's tokenizer settings say {name}, which takes blanks out of answers and is "
            "not supported. Set it to false in tokenizer_config.json."
        )


def _load(definition: str, named: Sequence[tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    tokenizer.add_tokens(list(named))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a control token in plain text is plain text
    return tokenizer
