"""Writes a document in memory to its file. docs/format.md lists the sections."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.policies.index import Form
from nearfar.records import ALL
from nearfar.runtime.memory.far_store import BLOCK_TOKENS
from nearfar.runtime.memory.near_store import stacked
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.saved.document_state import DocumentState, Model
from nearfar.runtime.saved.facts import Facts, Kept
from nearfar.runtime.saved.layout import Section
from nearfar.runtime.saved.writing import Content, write_container
from nearfar.runtime.text.text_origins import sources_as_json
from nearfar.storage import format_name

KIND = "document"


def write_document(
    path: Path, held: DocumentState, model: Model, *, made_from: str = "", private: bool = False
) -> None:
    """Write a document to ``path``; SavedDocumentError where it cannot be written.

    Indexes of other policies in its file are written too: they are of the same keys. So is the
    record of that file's inputs, unless ``made_from`` replaces it. ``private`` as in `whole_file`.
    """
    kept = _other_indexes(held)
    index = held.sequence.far.index
    own = None if index is None else index.form()
    forms = [form for form, _ in kept] + ([] if own is None else [own])
    facts = facts_of(held, model, tuple(forms))
    contents = [*_texts(held), *_near(held.sequence)]
    if facts.kept is None:
        contents += _rows(held.sequence, facts.row_bytes)
    for i, (_, arrays) in enumerate(kept):
        contents += [plain(f"index.{i}.{name}", array) for name, array in arrays.items()]
    if index is not None and own is not None:
        arrays = index.arrays()
        contents += [plain(f"index.{len(kept)}.{n}", array) for n, array in arrays.items()]
    about: dict[str, Any] = {"kind": KIND, "facts": facts.as_json()}
    if not made_from and held.container is not None:
        made_from = str(held.container.about.get("made_from", ""))
    if made_from:
        about["made_from"] = made_from
    write_container(path, about, contents, private=private)


def facts_of(held: DocumentState, model: Model, indexes: tuple[Form, ...] = ()) -> Facts:
    """The facts of a document for the header."""
    sequence, prompt = held.sequence, held.prompt
    settings, traits = sequence.settings, sequence.policy.traits
    near_dtype = format_name(sequence.near[0].rows.dtype)
    kept = None
    if traits.kind == "evicts":
        kept = Kept(sequence.kept_by, settings.budget.value, sequence.layers[0].near_limit)
    tokenizer = prompt.tokenizer.identity
    if held.facts is not None:  # conversations about the file are found by it
        tokenizer = held.facts.tokenizer_identity
    return Facts(
        model=model.name,
        model_identity=model.identity,
        tokenizer_identity=tokenizer,
        text_sha256=hashlib.sha256(prompt.text.encode()).hexdigest(),
        geometry=settings.geometry,
        tokens=sequence.tokens,
        near_dtype=near_dtype,
        # rows that are near under an exact policy keep their type, so that nothing is lost
        row_format=format_name(settings.far_dtype) if traits.keeps_far else near_dtype,
        # longer ones than the model reads make no difference
        sinks=min(settings.sinks, settings.capacity_tokens),
        window=min(settings.window, settings.capacity_tokens),
        rest=prompt.rest,
        read_seconds=held.read_seconds,
        kept=kept,
        indexes=indexes,
    )


def index_arrays(held: DocumentState, number: int) -> dict[str, NDArray[np.generic]]:
    """The arrays of one of the indexes in the document's file, checked."""
    container, prefix = held.container, f"index.{number}."
    assert container is not None
    names = [name for name in container.layout.places if name.startswith(prefix)]
    container.check(names)
    return {name.removeprefix(prefix): container.array(name) for name in names}


def _other_indexes(held: DocumentState) -> list[tuple[Form, dict[str, NDArray[np.generic]]]]:
    """Indexes in the document's file that are not the present policy's."""
    if held.container is None or held.facts is None:
        return []
    index = held.sequence.far.index
    form = None if index is None else index.form()
    own = None if form is None else form["index"]
    forms = enumerate(held.facts.indexes)
    return [(form, index_arrays(held, i)) for i, form in forms if form["index"] != own]


def _texts(held: DocumentState) -> list[Content]:
    prompt = held.prompt
    sources = json.dumps(sources_as_json(prompt.text.sources)).encode()
    breaks = [source.breaks for source in prompt.text.sources]
    return [
        plain("text", np.frombuffer(prompt.text.encode(), np.uint8)),
        plain("tokens", np.array(prompt.prefix_ids, np.int32)),
        plain("spans", prompt.spans),
        plain("sources", np.frombuffer(sources, np.uint8)),
        plain("breaks", np.concatenate([np.zeros(0, np.int32), *breaks])),
    ]


def _near(sequence: Sequence) -> list[Content]:
    """Near rows, without the rows that are near only because an exact policy keeps all near."""
    arrays = stacked([layer.near_to_save() for layer in sequence.layers])
    if sequence.evicted_summary is not None:
        arrays |= evicted_summary_arrays(sequence.evicted_summary.state())
    rows = arrays.pop("rows").cpu()
    contents = [plain("near", rows.view(torch.uint8).numpy())]
    return contents + [plain(name, array.cpu().numpy()) for name, array in arrays.items()]


def evicted_summary_arrays(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The summary of dropped rows, by the names of its sections; see `read_evicted_summary`."""
    return {f"remnant.{name}": tensor for name, tensor in state.items()}


def _rows(sequence: Sequence, row_bytes: int) -> list[Content]:
    """Far rows of each layer, each head a part and each block of tokens with its checksum."""
    contents = []
    for number, layer in enumerate(sequence.layers):
        rows = layer.far_to_save()
        if rows is not None:
            shape, block = (*rows.shape[:2], row_bytes), BLOCK_TOKENS * row_bytes
            section = Section(f"rows.{number}", "uint8", shape, len(rows), block)
            contents.append(Content(section, partial(_heads, sequence, number, rows)))
    return contents


def _heads(sequence: Sequence, layer: int, rows: torch.Tensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes of each head's rows; those from a file are verified before they go to another."""
    sequence.far.store.verify(layer, ALL)
    for head in rows:
        yield head.contiguous().cpu().view(torch.uint8).numpy()


def plain(name: str, array: NDArray[np.generic]) -> Content:
    """A section of one part with this array."""
    array = np.ascontiguousarray(array)
    return Content(Section(name, array.dtype.name, array.shape), lambda: [array])
