"""Text on a PDF's pages outside of their content: form fields and annotations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pypdf import PageObject, PdfReader
from pypdf.generic import ArrayObject, DictionaryObject, NameObject, StreamObject

_PASSWORD, _PUSH_BUTTON = 1 << 13, 1 << 16  # of a field's flags, /Ff
_DEEPEST = 32  # levels of fields in fields
_NO_COMMENT = {"/Widget", "/FreeText", "/Link", "/Popup"}


class Form:
    """The values of a document's fields, each of which is read once."""

    def __init__(self, reader: PdfReader) -> None:
        self._form = _dictionary(_dictionary(reader.trailer.get("/Root")).get("/AcroForm"))
        self._read: set[int] = set()  # ids of fields, which the reader keeps

    @property
    def has_xfa(self) -> bool:
        """Whether there is a form in XML too, which only few programs show."""
        return "/XFA" in self._form

    def lines_on(self, page: PageObject) -> tuple[list[str], int]:
        """The text of annotations on ``page``, and how many others have a comment."""
        lines, comments = [], 0
        for annotation in _dictionaries(page.get("/Annots")):
            kind = annotation.get("/Subtype")
            if kind == "/Widget":
                lines += self._line(annotation)
            elif kind == "/FreeText":
                lines.append(_as_text(annotation.get("/Contents")))
            elif kind not in _NO_COMMENT and _as_text(annotation.get("/Contents")).strip():
                comments += 1
        return [line for line in lines if line.strip()], comments

    def other_lines(self) -> list[str]:
        """Values of fields that are on no page."""
        return [line for field in self._leaves() for line in self._line(field)]

    def _leaves(self) -> Iterator[DictionaryObject]:
        waiting, seen = list(_dictionaries(self._form.get("/Fields"))), set()
        while waiting:
            field = waiting.pop(0)
            if id(field) in seen:
                continue
            seen.add(id(field))
            kids = [kid for kid in _dictionaries(field.get("/Kids")) if "/T" in kid]
            waiting += kids
            if not kids:
                yield field

    def _line(self, widget: DictionaryObject) -> list[str]:
        """`name: value`; nothing for a field that is empty, secret or was read before."""
        chain = [widget]
        while len(chain) < _DEEPEST and "/Parent" in chain[-1]:
            chain.append(_dictionary(chain[-1]["/Parent"]))
        owner = next((each for each in chain if "/V" in each), None)
        if owner is None or id(owner) in self._read:
            return []
        self._read.add(id(owner))
        kind, flags = _inherited(chain, "/FT"), _inherited(chain, "/Ff")
        flags = flags if isinstance(flags, int) else 0
        if (kind == "/Btn" and flags & _PUSH_BUTTON) or (kind == "/Tx" and flags & _PASSWORD):
            return []
        value = _value(owner["/V"], _inherited(chain, "/Opt"))
        names = [_as_text(each["/T"]) for each in reversed(chain) if "/T" in each]
        label = _as_text(_inherited(chain, "/TU")) or ".".join(names)
        if not value.strip():
            return []
        return [f"{label}: {value}" if label else value]


def _inherited(chain: list[DictionaryObject], key: str) -> Any:
    value = next((each[key] for each in chain if key in each), None)
    return value.get_object() if value is not None else None


def _value(value: Any, options: Any) -> str:
    """A field's value as it is shown; nothing for a box that is not ticked and for a signature."""
    value = value.get_object()
    if isinstance(value, StreamObject):
        return value.get_data().decode("utf-8", "replace")
    if isinstance(value, DictionaryObject):
        return ""
    if isinstance(value, NameObject):
        return "" if value == "/Off" else str(value).removeprefix("/")
    shown = {}
    for option in options if isinstance(options, ArrayObject) else []:
        pair = option.get_object()
        if isinstance(pair, ArrayObject) and len(pair) > 1:
            shown[_as_text(pair[0])] = _as_text(pair[1])
    chosen = value if isinstance(value, ArrayObject) else [value]
    return ", ".join(shown.get(_as_text(each), _as_text(each)) for each in chosen)


def _as_text(value: Any) -> str:
    value = value.get_object() if value is not None else None
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    return text.replace("\r\n", "\n").replace("\r", "\n") if isinstance(text, str) else ""


def _dictionary(value: Any) -> DictionaryObject:
    found = value.get_object() if value is not None else None
    return found if isinstance(found, DictionaryObject) else DictionaryObject()


def _dictionaries(values: Any) -> Iterator[DictionaryObject]:
    values = values.get_object() if values is not None else None
    for value in values if isinstance(values, ArrayObject) else []:
        found = value.get_object()
        if isinstance(found, DictionaryObject):
            yield found
