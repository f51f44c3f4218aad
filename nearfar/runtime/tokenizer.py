"""Text to token ids and back, with control tokens only where they are meant.

A control token (`<|im_end|>`) is recognised in text that a program wrote, such as a chat template,
and never in text that came from outside: there it is encoded as the characters it is spelled with.
This module knows tokenizer files; of chats it knows nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tokenizers

from nearfar.errors import CheckpointError
from nearfar.runtime.prefix_space import without_prefix_space
from nearfar.runtime.text_decoding import StreamDecoder

DEFINITION, SETTINGS, CHAT_TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_MARKS = ("bos_token", "eos_token", "unk_token", "pad_token")
_IDS = 2**32  # what the library takes as an id
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MOST_OPEN_TOKENS = 16  # at the end of a text, that what follows could change


class Part(NamedTuple):
    """A stretch of text; control tokens are recognised only in a trusted one."""

    text: str
    trusted: bool = False


class OpenText(NamedTuple):
    """What `Tokenizer.encode_open` made of a text that goes on."""

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
    ``marks`` are the control tokens that chat templates may name, `bos_token` for one. Tokenizers
    of the same ``identity``, a sha256 in hex, give the same prompts.
    """

    def __init__(
        self,
        definition: str,
        settings: Mapping[str, Any],
        chat_template: str | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.chat_template = chat_template
        described = json.dumps([definition, dict(settings), chat_template], sort_keys=True)
        self.identity = hashlib.sha256(described.encode()).hexdigest()
        self.marks = {name: _spelling(settings[name]) for name in _MARKS if settings.get(name)}
        self._first = _load(definition)
        parsed = json.loads(definition)
        inner, self._spaced_after_control = without_prefix_space(parsed)
        self._inner = self._first if inner is None else _load(json.dumps(inner))
        added = self._first.get_added_tokens_decoder()
        self._control = {token.content: i for i, token in added.items() if token.special}
        self._control_ids = frozenset(self._control.values())
        self._joins_bytes = '"ByteFallback"' in json.dumps(parsed.get("decoder"))
        self._control_pattern = _pattern([token for token in added.values() if token.special])
        end = self._control.get(self.marks.get("eos_token", ""))
        own_end = [] if end is None else [end]
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *own_end]))
        self.opening_ids = self._opening_ids(bool(settings.get("add_bos_token")))

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

        ``continues``: they go on in the middle of a text that was encoded before.
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

        Ids that no token has say nothing: a model may have more rows than its tokenizer tokens.
        """
        known = [i for i in ids if 0 <= i < _IDS]
        text: str = self._first.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one by one; its pieces join to what `decode` says."""
        return StreamDecoder(self.decode, self._says_nothing, self._is_byte)

    def _says_nothing(self, token_id: int) -> bool:
        return token_id in self._control_ids or not self._spelling_of(token_id)

    def _is_byte(self, token_id: int) -> bool:
        """Whether the token is a byte of which a run becomes text only as a whole."""
        return self._joins_bytes and _BYTE.fullmatch(self._spelling_of(token_id)) is not None

    def _spelling_of(self, token_id: int) -> str:
        """The token as the vocabulary has it; empty where there is none."""
        return (self._first.id_to_token(token_id) or "") if 0 <= token_id < _IDS else ""

    def _runs(self, parts: Iterable[Part], continues: bool) -> list[_Run]:
        """``parts`` cut at their control tokens; text on both sides of a seam is joined."""
        contents: list[int | str] = [""]
        for text, trusted in parts:
            end = 0
            for match in self._control_pattern.finditer(text) if trusted else ():
                contents[-1] = f"{contents[-1]}{text[end : match.start()]}"
                contents += [self._control[match[0].strip()], ""]
                end = match.end()
            contents[-1] = f"{contents[-1]}{text[end:]}"
        runs = [_Run(contents[0], "text" if continues else "nothing")]
        runs += [_Run(content, "control") for content in contents[1:]]
        return [run for run in runs if run.content != ""] or runs[:1]

    def _encoding(self, run: _Run) -> tokenizers.Encoding:
        """Text encoded with no control token in it, and with a space before it if that belongs."""
        first = run.after == "nothing" or (run.after == "control" and self._spaced_after_control)
        tokenizer = self._first if first else self._inner
        return tokenizer.encode(run.content, add_special_tokens=False)

    def _opening_ids(self, add_bos_token: bool) -> list[int]:
        """What the file's post-processor, or else the setting, puts before a text."""
        plain: list[int] = self._first.encode("a", add_special_tokens=False).ids
        marked: list[int] = self._first.encode("a", add_special_tokens=True).ids
        for start in range(len(marked)):
            if start and marked[start : start + len(plain)] == plain:
                return marked[:start]
        bos = self._control.get(self.marks.get("bos_token", ""))
        return [bos] if add_bos_token and bos is not None else []


def read_tokenizer(folder: Path, eos_token_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokenizer in ``folder``: tokenizer.json, its settings and a chat template.

    Raises CheckpointError for a missing or invalid file.
    """
    settings = _read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    definition = _read(folder / DEFINITION)
    if (folder / CHAT_TEMPLATE).is_file():
        template: str | None = _read(folder / CHAT_TEMPLATE)
    else:
        template = _default_template(settings.get("chat_template"))
    try:
        return Tokenizer(definition, settings, template, eos_token_ids)
    except Exception as error:  # the library raises a bare Exception
        if type(error) is not Exception and not isinstance(error, ValueError):
            raise
        raise CheckpointError(
            f"{folder / DEFINITION} is not a valid tokenizer ({error}). Download the file again."
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Download the model again."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}). Download the file again."
        ) from error
    return content if isinstance(content, dict) else {}


def _default_template(value: object) -> str | None:
    """A chat template of tokenizer_config.json: one, or a list of named ones."""
    if isinstance(value, list):
        named = {entry["name"]: entry["template"] for entry in value}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _spelling(value: str | Mapping[str, Any]) -> str:
    return value if isinstance(value, str) else str(value["content"])


def _pattern(tokens: Sequence[tokenizers.AddedToken]) -> re.Pattern[str]:
    """What matches a control token, the longest first, and the blanks it swallows."""
    longest_first = sorted(tokens, key=lambda token: -len(token.content))
    spellings = [
        (r"\s*" if token.lstrip else "")
        + re.escape(token.content)
        + (r"\s*" if token.rstrip else "")
        for token in longest_first
    ]
    return re.compile("|".join(spellings) or r"(?!)")


def _load(definition: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a control token in plain text is plain text
    return tokenizer
