"""Makes a document in memory from a file: checked, mapped, and with an index.

A reader trusts nothing: each value of the header has a rule, each array has the one size that
follows from them, and an index checks its own arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nearfar.policies.index import Stateless
from nearfar.progress import Progress, silent
from nearfar.records import ALL
from nearfar.runtime.memory.far_store import BLOCK_TOKENS
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.memory.near_store import NearLayer
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.memory.sequence_settings import SequenceSettings
from nearfar.runtime.saved.container import Container, damaged
from nearfar.runtime.saved.document_state import DocumentState, Model
from nearfar.runtime.saved.facts import NEAR_DTYPES, Facts
from nearfar.runtime.saved.opened import (
    NONSENSE,
    OpenedDocument,
    check_model,
    check_policy,
    prompt_of,
)
from nearfar.runtime.saved.rows import MappedRows
from nearfar.runtime.saved.write_document import index_arrays
from nearfar.runtime.text.tokenizer import Tokenizer
from nearfar.storage import FORMATS, decode_keys, decode_values, group_tokens


@dataclass(frozen=True)
class Reader:
    """The opener of a document: the model that will answer and its sequences."""

    model: Model
    tokenizer: Tokenizer
    settings: SequenceSettings
    ledger: Ledger
    check_memory: Callable[[int, int], None]  # of tokens, and far bytes that are in a file


def read_document(
    opened: OpenedDocument, reader: Reader, progress: Progress = silent
) -> DocumentState:
    """The state in a saved document; SavedDocumentError for another model, tokenizer or policy.

    ``progress`` counts layers if an index must be made. The file is closed.
    """
    path, container, facts = opened.path, opened.container, opened.facts
    try:
        check_model(opened, reader.model, reader.tokenizer)
        check_policy(path, facts, reader.settings)
        if facts.geometry != reader.settings.geometry:
            raise ValueError("its sizes are not those of its model")
        if facts.tokens > reader.settings.capacity_tokens:
            raise ValueError(f"it has {facts.tokens:,} tokens, more than its model reads")
        reader.check_memory(facts.tokens, _far_bytes(container, facts))
        prompt = prompt_of(opened, reader.tokenizer)
        sequence = _sequence(container, facts, reader)
        held = DocumentState(prompt, sequence, facts.read_seconds, container, facts)
        return dataclasses.replace(held, index_is_new=_give_index(held, progress))
    except NONSENSE as error:
        raise damaged(path, f"it is not valid ({error})") from error
    finally:
        container.close()


def _sequence(container: Container, facts: Facts, reader: Reader) -> Sequence:
    """A sequence that has read the document, with its far rows mapped from the file."""
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
    sequence = Sequence(settings, reader.ledger, rows if keeps_far else None)
    sequence.tokens = facts.tokens
    limit = None if facts.kept is None else facts.kept.near_limit
    for number, layer in enumerate(sequence.layers):
        part = near[number]
        if rows is not None and not keeps_far:
            part = _all_near(part, rows.copied(number), facts).to(settings.near_dtype)
        layer.take_saved(_saved_layer(container, layer.near, number, part), limit)
    if sequence.evicted_summary is not None:
        sequence.evicted_summary.restore(read_evicted_summary(container, sequence))
    return sequence


def read_evicted_summary(container: Container, sequence: Sequence) -> dict[str, torch.Tensor]:
    """The file's summary of rows that the policy dropped; empty if the policy has none."""
    found, summary = {}, sequence.evicted_summary
    for name, like in ({} if summary is None else summary.state()).items():
        array = container.array(f"remnant.{name}", "float32", tuple(like.shape))
        found[name] = torch.tensor(array, device=like.device)
    return found


def _all_near(near: torch.Tensor, far: torch.Tensor, facts: Facts) -> torch.Tensor:
    """All rows of a layer [Hkv, N, 2 D] in token order, from ``near`` and stored ``far`` ones."""
    stored = far.view(FORMATS[facts.row_format])
    tokens = stored.shape[1]
    middle = torch.cat([decode_keys(stored, 0, tokens), decode_values(stored, 0, tokens)], -1)
    sinks = near[:, : facts.sinks]
    return torch.cat([sinks, middle.to(near.dtype), near[:, facts.sinks :]], 1)


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
        index.restore(index_arrays(held, facts.indexes.index(form)), far_tokens)
        return False
    index.reserve(far_tokens)
    for layer in range(layers if far_tokens else 0):
        sequence.far.store.verify(layer, ALL)
        index.extend(layer, sequence.far.store.view(layer))
        progress(layer + 1, layers)
    return form is not None
