"""A saved document's open file: its facts, and checks that a model and a policy fit them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from nearfar.errors import NearfarError, SavedDocumentError
from nearfar.policies.base import Policy
from nearfar.runtime.memory.sequence_settings import SequenceSettings
from nearfar.runtime.saved.container import DOCUMENT, Container, damaged, open_container
from nearfar.runtime.saved.document_state import Model
from nearfar.runtime.saved.facts import Facts, parse_facts
from nearfar.runtime.text.chat import DocumentPrompt
from nearfar.runtime.text.text_origins import Text, sources_from_json
from nearfar.runtime.text.tokenizer import Tokenizer

# what parsing raises where a file's values are not what they can be
NONSENSE = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True)
class OpenedDocument:
    """A saved document's open file and its facts; `Engine.open` takes and closes it.

    As a context manager it closes the file.
    """

    container: Container
    facts: Facts

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.container.path

    def __enter__(self) -> OpenedDocument:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()


def open_facts(path: Path) -> OpenedDocument:
    """A saved document, opened; SavedDocumentError if the file is none."""
    container = open_container(path)
    try:
        if container.about.get("kind") != DOCUMENT.name:
            raise SavedDocumentError(
                f"{path} is a conversation and not a document. Name the document that it is about, "
                f"and go on with it: nearfar ask DOCUMENT --session {path}"
            )
        return OpenedDocument(container, parse_facts(container.about.get("facts")))
    except BaseException as error:
        container.close()
        if isinstance(error, NONSENSE):
            raise damaged(path, f"its header is not valid ({error})") from error
        raise


def source_names(container: Container) -> list[str]:
    """Names of the files that a document was made of."""
    try:
        described = json.loads(container.array("sources", "uint8", (None,)).tobytes())
        return [str(source["name"]) for source in described]
    except NONSENSE as error:
        raise damaged(container.path, f"it is not valid ({error})") from error


def check_model(opened: OpenedDocument, model: Model, tokenizer: Tokenizer) -> None:
    """Raise SavedDocumentError if another model or tokenizer read the document.

    A tokenizer that differs, as it does for an earlier version of nearfar, is good enough if it
    makes the same tokens of the document.
    """
    path, facts = opened.path, opened.facts
    again = "Ask it with the model that read it (--model), or index the document again."
    if facts.model_identity != model.identity:
        raise SavedDocumentError(
            f"{path} was read by another model, {facts.model}, than {model.name}: they differ in "
            f"weights or configuration. {again}"
        )
    if facts.tokenizer_identity == tokenizer.identity or _reads_the_same(opened, tokenizer):
        return
    if options := tokenizer.options_of(facts.tokenizer_identity):
        raise SavedDocumentError(
            f"{path} was read with {options}, and the chat template begins otherwise now. Ask it "
            f"with {options}, or index the document again."
        )
    raise SavedDocumentError(
        f"{path} was read with another tokenizer or chat template than {model.name} has. {again}"
    )


def _reads_the_same(opened: OpenedDocument, tokenizer: Tokenizer) -> bool:
    """Whether ``tokenizer`` makes the saved tokens of the document's text."""
    try:
        saved = prompt_of(opened, tokenizer)
        own = DocumentPrompt(tokenizer, saved.text)
    except (*NONSENSE, NearfarError):
        return False
    return (own.prefix_ids, own.rest) == (saved.prefix_ids, saved.rest)


def prompt_of(opened: OpenedDocument, tokenizer: Tokenizer) -> DocumentPrompt:
    """Text, tokens and where they come from; ValueError if they do not belong together."""
    container, facts = opened.container, opened.facts
    characters = container.array("text", "uint8", (None,)).tobytes().decode()
    if hashlib.sha256(characters.encode()).hexdigest() != facts.text_sha256:
        raise ValueError("the text is not the one of the header")
    ids = container.array("tokens", "int32", (facts.tokens,))
    spans = container.array("spans", "int32", (facts.tokens, 2))
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise ValueError("a token is not in the vocabulary")
    if spans.size and not 0 <= spans.min() <= spans.max() <= len(characters):
        raise ValueError("a token lies outside of the text")
    described = json.loads(container.array("sources", "uint8", (None,)).tobytes())
    breaks = container.array("breaks", "int32", (None,))
    text = Text(characters, sources_from_json(described, breaks, len(characters)))
    return DocumentPrompt.restored(tokenizer, text, ids.tolist(), spans, facts.rest)


def check_policy(path: Path, facts: Facts, settings: SequenceSettings) -> None:
    """Raise SavedDocumentError if the policy needs keys that are missing."""
    own = settings.policy if settings.policy.traits.kind == "evicts" else None
    wanted = None if own is None else (own.described(), settings.budget.value)
    had = None if facts.kept is None else (facts.kept.policy, facts.kept.budget)
    if wanted != had:
        raise SavedDocumentError(
            f"{path} holds {_holding(facts)}, and {settings.policy.name} with a budget of "
            f"{settings.budget.value:g} needs {_needing(own, facts)}. Ask it under another "
            "--policy, or index the document again under this one."
        )


def _holding(facts: Facts) -> str:
    if facts.kept is None:
        return "all keys of the document"
    return f"what {facts.kept.policy.get('name')} with a budget of {facts.kept.budget:g} kept"


def _needing(policy: Policy | None, facts: Facts) -> str:
    if policy is None:
        return "all keys"
    needing = "to choose its own while reading"
    had, own = {} if facts.kept is None else facts.kept.policy, policy.described()
    if had.get("name") != policy.name:
        return needing
    changed = [name for name in own if own[name] != had.get(name)]
    return f"{needing}, with another value of {', '.join(changed)}" if changed else needing
