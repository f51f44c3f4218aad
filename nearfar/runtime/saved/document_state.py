"""The state of a document that was read, which a file stores and restores."""

from __future__ import annotations

from dataclasses import dataclass

from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.saved.container import Container
from nearfar.runtime.saved.facts import Facts
from nearfar.runtime.text.chat import DocumentPrompt


@dataclass(frozen=True)
class Model:
    """The model that reads and answers, for people and to tell it from others."""

    name: str
    identity: str  # sha256 over config, weights and adapter


@dataclass(frozen=True)
class DocumentState:
    """A document and the sequence that has read exactly its prefix."""

    prompt: DocumentPrompt
    sequence: Sequence
    read_seconds: float  # that reading took, whenever that was
    container: Container | None = None  # of the file that it comes from
    facts: Facts | None = None  # that are in that file
    index_is_new: bool = False  # whether the file has no index of this form
