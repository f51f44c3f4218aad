"""Decides which saved files a document or a conversation may replace without a request.

A document replaces one of the same model whose whole text it contains: an earlier form, one with
another index or an earlier reading. `nearfar index` also replaces one that was made from the same
files, which may have changed. A conversation replaces one that it continues.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nearfar.errors import OutputExistsError, OutputNameError, SavedDocumentError
from nearfar.output.place import Place, check_replaced, find_place
from nearfar.results import Turn
from nearfar.runtime.saved.container import (
    CONVERSATION,
    Container,
    is_container,
    open_container,
)
from nearfar.runtime.saved.conversation_file import identity_of_document, open_talk
from nearfar.runtime.saved.document_state import DocumentState, Model
from nearfar.runtime.saved.opened import NONSENSE, open_facts, source_names
from nearfar.runtime.saved.write_document import facts_of

DOCUMENT_KIND = "a saved document that was made from the same documents"
CONVERSATION_KIND = "an earlier part of this conversation"


def inputs_digest(paths: Iterable[str]) -> str:
    """A sha256 in hex over the places of input files, to recognise a later run on them."""
    places = [os.path.realpath(path) for path in paths]
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()


def document_place(name: str | Path, held: DocumentState, model: Model, overwrite: bool) -> Path:
    """Where a document is saved under ``name``; OutputNameError if it may not be."""
    place = find_place(name)
    check_document(place, lambda path: _is_start_of(path, held, model), overwrite=overwrite)
    return place.path


def check_document(
    place: Place,
    is_own: Callable[[Path], bool],
    *,
    overwrite: bool = False,
    read: Iterable[str | Path] = (),
) -> None:
    """As `check_replaced` for a document; an existing saved one is recognised by its content."""
    try:
        check_replaced(place, DOCUMENT_KIND, is_own, overwrite=overwrite, read=read)
    except OutputExistsError as error:
        names = _sources_of(place.path)
        if not names or is_own(place.path):
            raise
        raise OutputExistsError(place.named, f"exists and holds {', '.join(names)}") from error


def _sources_of(path: Path) -> list[str]:
    """Names of the files in a saved document; none where it is no such file."""
    try:
        with open_facts(path) as opened:
            return source_names(opened.container)
    except (SavedDocumentError, OSError):
        return []


def was_made_from(path: Path, digest: str) -> bool:
    """Whether a saved document was made from the inputs of `inputs_digest`."""
    try:
        with open_facts(path) as opened:
            return opened.container.about.get("made_from") == digest
    except (SavedDocumentError, OSError):
        return False


def conversation_place(
    name: str | Path, turns: Sequence[Turn], held: DocumentState, model: Model, overwrite: bool
) -> Path:
    """Where ``turns`` about a document are saved; OutputNameError if they may not be."""
    place = find_place(name)
    document = identity_of_document(held, model)
    check_replaced(
        place,
        CONVERSATION_KIND,
        lambda path: _goes_on(path, document, turns),
        overwrite=overwrite,
    )
    return place.path


class Session(NamedTuple):
    """Where a conversation is kept, and its file, opened, if it has begun."""

    place: Place
    begun: Container | None


def open_session(name: str | Path, read: Sequence[str | Path]) -> Session:
    """A conversation that continues or begins, checked before the first question.

    Raises OutputNameError where a conversation cannot be kept, as where another kind of file is
    there, and SavedDocumentError for a conversation that is damaged or of another version.
    """
    place = find_place(name)
    other = "Name another file for the conversation."
    try:
        check_replaced(place, CONVERSATION_KIND, is_container, read=read)
    except OutputExistsError as error:
        raise OutputNameError(f"{error.state} {other}") from error
    if place.before is None or not place.before.st_size:
        return Session(place, None)
    container = open_container(Path(place.named), CONVERSATION)
    if container.about.get("kind") != CONVERSATION.name:
        container.close()
        raise OutputNameError(f"{place.named} is a document and not a conversation. {other}")
    return Session(place, container)


def _is_start_of(path: Path, held: DocumentState, model: Model) -> bool:
    """Whether a document contains everything that a saved document has."""
    try:
        opened = open_facts(path)
    except (SavedDocumentError, OSError):
        return False
    own, text = facts_of(held, model), held.prompt.text
    try:
        with opened:
            names = source_names(opened.container)
            start: bytes = opened.container.array("text", "uint8").tobytes()
    except (SavedDocumentError, *NONSENSE):
        return False
    return (
        text.encode().startswith(start)
        and [source.name for source in text.sources][: len(names)] == names
        and opened.facts.model_identity == own.model_identity
        and own.kept in (None, opened.facts.kept)
    )


def _goes_on(path: Path, document: str, turns: Sequence[Turn]) -> bool:
    """Whether a saved conversation is the beginning of ``turns``."""
    try:
        container = open_talk(path)
    except (SavedDocumentError, OSError):
        return False
    container.close()
    facts: Any = container.about.get("facts")
    if not isinstance(facts, dict):
        return False
    said = [[turn.question, turn.answer] for turn in turns]
    before = facts.get("turns")
    if facts.get("document") != document or not isinstance(before, list):
        return False
    return said[: len(before)] == before
