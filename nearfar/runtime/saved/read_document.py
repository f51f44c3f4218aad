"""From a file to a document in memory: checked, mapped, and with an index.

A reader trusts nothing: each value of the header has a rule, each array the one size that follows
from them, and whatever an index could stumble over is looked at by the index itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nearfar.errors import SavedDocumentError
from nearfar.policies.base import Policy
from nearfar.policies.index import Stateless
from nearfar.progress import Progress, silent
from nearfar.records import ALL
from nearfar.runtime.memory.far_store import BLOCK_TOKENS
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.memory.near_store import NearLayer
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.memory.sequence_settings import SequenceSettings
from nearfar.runtime.saved.container import DOCUMENT, Container, damaged, open_container
from nearfar.runtime.saved.document_state import DocumentState, Model
from nearfar.runtime.saved.facts import NEAR_DTYPES, Facts, parse_facts
from nearfar.runtime.saved.rows import MappedRows
from nearfar.runtime.saved.write_document import index_arrays
from nearfar.runtime.text.chat import DocumentPrompt
from nearfar.runtime.text.text_origins import Text, sources_from_json
from nearfar.runtime.text.tokenizer import Tokenizer
from nearfar.storage import FORMATS, decode_keys, decode_values, group_tokens

# what parsing raises where a file's values are not what they can be
NONSENSE = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True)
class Reader:
    """Who opens a document: the model that will answer and the sequences that it makes."""

    model: Model
    tokenizer: Tokenizer
    settings: SequenceSettings
    like: torch.Tensor  # of the type and on the device of near rows
    ledger: Ledger
    check_memory: Callable[[int, int], None]  # of tokens, and far bytes that are in a file


@dataclass(frozen=True)
class OpenedDocument:
    """A saved document's file, open, and what its header says; `Engine.open` takes and closes it.

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


def read_document(
    opened: OpenedDocument, reader: Reader, progress: Progress = silent
) -> DocumentState:
    """What a saved document holds; SavedDocumentError for another model, tokenizer or policy.

    ``progress`` counts layers, where an index must be made. The file is closed.
    """
    path, container, facts = opened.path, opened.container, opened.facts
    try:
        check_model(path, facts, reader.model, reader.tokenizer)
        _check_policy(path, facts, reader.settings)
        if facts.geometry != reader.settings.geometry:
            raise ValueError("its sizes are not those of its model")
        if facts.tokens > reader.settings.capacity_tokens:
            raise ValueError(f"it has {facts.tokens:,} tokens, more than its model reads")
        reader.check_memory(facts.tokens, _far_bytes(container, facts))
        prompt = _prompt(container, facts, reader.tokenizer)
        sequence = _sequence(container, facts, reader)
        held = DocumentState(prompt, sequence, facts.read_seconds, container, facts)
        return dataclasses.replace(held, index_is_new=_give_index(held, progress))
    except NONSENSE as error:
        raise damaged(path, f"it is not valid ({error})") from error
    finally:
        container.close()


def check_model(path: Path, facts: Facts, model: Model, tokenizer: Tokenizer) -> None:
    """Raise SavedDocumentError where another model or tokenizer read the document."""
    again = "Ask it with the model that read it (--model), or index the document again."
    if facts.model_identity != model.identity:
        raise SavedDocumentError(
            f"{path} was read by another model, {facts.model}, than {model.name}: they differ in "
            f"weights or configuration. {again}"
        )
    if facts.tokenizer_identity == tokenizer.identity:
        return
    if options := tokenizer.options_of(facts.tokenizer_identity):
        raise SavedDocumentError(
            f"{path} was read with {options}, and the chat template begins otherwise now. Ask it "
            f"with {options}, or index the document again."
        )
    raise SavedDocumentError(
        f"{path} was read with another tokenizer or chat template than {model.name} has. {again}"
    )


def _check_policy(path: Path, facts: Facts, settings: SequenceSettings) -> None:
    """Raise SavedDocumentError where the policy needs keys that are not there."""
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


def _prompt(container: Container, facts: Facts, tokenizer: Tokenizer) -> DocumentPrompt:
    """Text, tokens and where they come from."""
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


def _sequence(container: Container, facts: Facts, reader: Reader) -> Sequence:
    """A sequence that has read the document, its far rows where they are in the file."""
    rows = None if facts.kept is not None else _mapped_rows(container, facts)
    near = _near_rows(container, facts)
    far_tokens = 0 if rows is None else rows.tokens
    around = facts.sinks + facts.window
    if facts.kept is None and near.shape[2] + far_tokens != facts.tokens:
        raise ValueError("its keys are not those of its tokens")
    group = group_tokens(FORMATS[facts.row_format])
    if far_tokens % group or (far_tokens and not around <= near.shape[2] < around + group):
        raise ValueError("its near keys are not sinks and window")
    if around > 2 * reader.settings.capacity_tokens:
        raise ValueError("its sinks and window are longer than its model reads")
    settings = dataclasses.replace(
        reader.settings,
        sinks=facts.sinks,
        window=facts.window,
        far_dtype=FORMATS[facts.row_format],
    )
    keeps_far = settings.policy.traits.keeps_far
    sequence = Sequence(settings, reader.like, reader.ledger, rows if keeps_far else None)
    sequence.tokens = facts.tokens
    limit = None if facts.kept is None else facts.kept.near_limit
    for number, layer in enumerate(sequence.layers):
        part = near[number]
        if rows is not None and not keeps_far:
            part = _all_near(part, rows.copied(number), facts).to(reader.like.dtype)
        layer.take_saved(_saved_layer(container, layer.near, number, part), limit)
    if sequence.remnant is not None:
        sequence.remnant.restore(read_remnant(container, sequence))
    return sequence


def read_remnant(container: Container, sequence: Sequence) -> dict[str, torch.Tensor]:
    """What the file holds of rows that the policy dropped; empty if it keeps nothing of them."""
    found = {}
    for name, like in ({} if sequence.remnant is None else sequence.remnant.state()).items():
        array = container.array(f"remnant.{name}", "float32", tuple(like.shape))
        found[name] = torch.tensor(array, device=like.device)
    return found


def _all_near(near: torch.Tensor, far: torch.Tensor, facts: Facts) -> torch.Tensor:
    """All rows of a layer [Hkv, N, 2 D] in token order, from ``near`` and stored ``far`` ones."""
    stored = far.view(FORMATS[facts.row_format])
    tokens = stored.shape[1]
    middle = torch.cat([decode_keys(stored, 0, tokens), decode_values(stored, 0, tokens)], -1)
    sinks = facts.sinks if middle.shape[1] else near.shape[1]
    return torch.cat([near[:, :sinks], middle.to(near.dtype), near[:, sinks:]], 1)


def _far_bytes(container: Container, facts: Facts) -> int:
    places = container.layout.places.values()
    sections = [place.section for place in places if place.section.name.startswith("rows.")]
    # a store counts whole blocks
    block = facts.geometry.kv_heads * BLOCK_TOKENS * facts.row_bytes
    return sum(-(-section.num_bytes // block) * block for section in sections)


def _mapped_rows(container: Container, facts: Facts) -> MappedRows:
    """The far rows of all layers, of the one size that they can have."""
    names = [f"rows.{layer}" for layer in range(facts.geometry.layers)]
    tokens = container.place(names[0]).section.shape[1:2]
    heads, row_bytes = facts.geometry.kv_heads, facts.row_bytes
    for name in names:
        section = container.place(name).section
        fits = section.dtype == "uint8" and section.shape == (heads, *tokens, row_bytes)
        if not fits or section.parts != heads or section.block_bytes != BLOCK_TOKENS * row_bytes:
            raise ValueError(f"section {name!r} does not have its size")
    return MappedRows(container, names, row_bytes)


def _near_rows(container: Container, facts: Facts) -> torch.Tensor:
    """Near rows [layers, Hkv, n, 2 D] in the type in which they were near."""
    geometry = facts.geometry
    shape = (geometry.layers, geometry.kv_heads, None, facts.near_row_bytes)
    near = torch.from_numpy(container.array("near", "uint8", shape))
    return near.view(NEAR_DTYPES[facts.near_dtype])


def _saved_layer(
    container: Container, like: NearLayer, number: int, rows: torch.Tensor
) -> NearLayer:
    """``rows`` [Hkv, n, 2 D] of a layer, with positions and scores where ``like`` has them."""
    saved = NearLayer(rows, rows.shape[1])
    shape = (None, *rows.shape[:2])
    if like.positions is not None:
        positions = container.array("positions", "int64", shape)[number]
        saved.positions = torch.from_numpy(positions)
    if like.scores is not None:
        scores = container.array("scores", "float32", shape)[number]
        saved.scores = torch.from_numpy(scores)
    return saved


def _give_index(held: DocumentState, progress: Progress) -> bool:
    """Take the policy's index from the file, or make it; True if it was made and can be saved."""
    sequence, facts = held.sequence, held.facts
    index = sequence.far.index
    if index is None or facts is None or isinstance(index, Stateless):
        return False
    form = index.form()
    far_tokens, layers = sequence.far.store.length(0), len(sequence.near)
    if form is not None and form in facts.indexes:
        index.take(index_arrays(held, facts.indexes.index(form)), far_tokens)
        return False
    index.reserve(far_tokens)
    for layer in range(layers if far_tokens else 0):
        sequence.far.store.verify(layer, ALL)
        index.extend(layer, sequence.far.store.view(layer))
        progress(layer + 1, layers)
    return form is not None


def source_names(container: Container) -> list[str]:
    """Names of the files that a document was made of."""
    try:
        described = json.loads(container.array("sources", "uint8", (None,)).tobytes())
        return [str(source["name"]) for source in described]
    except NONSENSE as error:
        raise damaged(container.path, f"it is not valid ({error})") from error
