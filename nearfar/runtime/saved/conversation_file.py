"""A conversation about a document as a file: its text, and the rows after the document.

The container is that of a document; the document itself is not in it, only its identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.errors import SavedDocumentError
from nearfar.results import Turn
from nearfar.runtime.memory.near_store import NearLayer, lengths_of, stacked
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.memory.tail import SequenceDelta
from nearfar.runtime.saved.container import CONVERSATION, Container, open_container
from nearfar.runtime.saved.document_state import DocumentState, Model
from nearfar.runtime.saved.facts import NEAR_DTYPES
from nearfar.runtime.saved.opened import NONSENSE
from nearfar.runtime.saved.read_document import read_evicted_summary
from nearfar.runtime.saved.write_document import evicted_summary_arrays, facts_of, plain
from nearfar.runtime.saved.writing import write_container
from nearfar.storage import FORMATS, format_name, group_tokens, token_bytes

_FACTS = {"document", "layout", "tokens", "turns", "pending_ids", "near_dtype", "far_dtype"}


@dataclass(frozen=True)
class ConversationState:
    """The turns, and the state of the sequence after them."""

    turns: tuple[Turn, ...]
    tail: SequenceDelta
    pending_ids: tuple[int, ...]  # what no step has read yet: an answer's end, or whole turns


def write_conversation(
    path: Path, talk: ConversationState, held: DocumentState, model: Model
) -> None:
    """Write a conversation about ``held``; SavedDocumentError where it cannot be written."""
    near, far = talk.tail.near, talk.tail.far
    arrays = stacked(near)
    facts = {
        "document": identity_of_document(held, model),
        "layout": _layout(held.sequence),
        "tokens": talk.tail.tokens,
        "turns": [[turn.question, turn.answer] for turn in talk.turns],
        "pending_ids": list(talk.pending_ids),
        "near_dtype": format_name(near[0].rows.dtype),
        "far_dtype": format_name(far[0].dtype),
    }
    contents = [
        plain("near", _bytes_of(arrays.pop("rows"))),
        plain("far", _bytes_of(torch.stack(far))),
    ]
    if talk.tail.evicted_summary is not None:
        arrays |= evicted_summary_arrays(talk.tail.evicted_summary)
    contents += [plain(name, array.cpu().numpy()) for name, array in arrays.items()]
    write_container(path, {"kind": CONVERSATION.name, "facts": facts}, contents)


def open_talk(path: Path) -> Container:
    """The file of a saved conversation; SavedDocumentError if it is none."""
    container = open_container(path, CONVERSATION)
    if container.about.get("kind") != CONVERSATION.name:
        container.close()
        raise SavedDocumentError(
            f"{path} is a document and not a conversation about one. {CONVERSATION.make}"
        )
    return container


def read_conversation(container: Container, held: DocumentState, model: Model) -> ConversationState:
    """A conversation about ``held``; SavedDocumentError if it is about another document.

    The file, which `open_talk` opened, is closed.
    """
    path = container.path
    try:
        facts = container.about["facts"]
        if set(facts) != _FACTS:
            raise ValueError("a value of the header is missing")
        if facts["document"] != identity_of_document(held, model):
            raise SavedDocumentError(
                f"{path} is a conversation about another document, or with another model. Name "
                "another file to begin a new one."
            )
        if facts["layout"] != _layout(held.sequence):
            raise SavedDocumentError(
                f"{path} is a conversation under {facts['layout']['policy']}, whose memory "
                f"{held.sequence.policy.name} cannot use. Go on under that policy."
            )
        return ConversationState(
            _turns(facts), _tail(container, facts, held.sequence), _pending(facts, held)
        )
    except NONSENSE as error:
        raise container.damaged(f"it is not valid ({error})") from error
    finally:
        container.close()


def identity_of_document(held: DocumentState, model: Model) -> str:
    """A sha256 in hex over the text and the settings of its reading."""
    return facts_of(held, model).identity(np.array(held.prompt.prefix_ids, "<i4").tobytes())


def _layout(sequence: Sequence) -> dict[str, Any]:
    """The values that must be equal for conversations to share rows."""
    policy = sequence.policy
    if policy.traits.kind == "evicts":
        return {"policy": policy.name, "kept": sequence.kept_by}
    return {"policy": "a policy that keeps far keys" if policy.traits.keeps_far else policy.name}


def _turns(facts: dict[str, Any]) -> tuple[Turn, ...]:
    turns = [(question, answer) for question, answer in facts["turns"]]
    if not turns or not all(isinstance(text, str) for turn in turns for text in turn):
        raise ValueError("a turn is not a question and an answer")
    return tuple(Turn(*turn) for turn in turns)


def _pending(facts: dict[str, Any], held: DocumentState) -> tuple[int, ...]:
    pending, known = facts["pending_ids"], held.prompt.tokenizer.vocab_size
    room = held.sequence.settings.capacity_tokens - facts["tokens"]
    if len(pending) > room or not all(type(i) is int and 0 <= i < known for i in pending):
        raise ValueError("the last answer does not end as one can")
    return tuple(pending)


def _tail(container: Container, facts: dict[str, Any], sequence: Sequence) -> SequenceDelta:
    """The rows, in the types and of the number that the sequence needs."""
    geometry, tokens = sequence.settings.geometry, facts["tokens"]
    least, most = sequence.tokens, sequence.settings.capacity_tokens
    if type(tokens) is not int or not least <= tokens <= most:
        raise ValueError("its number of tokens is impossible")
    shape = (geometry.layers, geometry.kv_heads, None)

    def rows(name: str, known: Mapping[str, torch.dtype]) -> torch.Tensor:
        dtype = known[facts[f"{name}_dtype"]]
        row_bytes = token_bytes(dtype, geometry.head_dim)
        data = torch.from_numpy(container.array(name, "uint8", (*shape, row_bytes)))
        return data.clone().view(dtype)

    like, far = sequence.near[0].rows, rows("far", FORMATS)
    _check_far(far, sequence.far.store.dtype)
    near = rows("near", NEAR_DTYPES).to(like)
    count = near.shape[2]
    extra: list[dict[str, torch.Tensor]] = [{} for _ in near]
    for name, dtype in (("positions", "int64"), ("scores", "float32")):
        if getattr(sequence.near[0], name) is not None:
            array = container.array(name, dtype, (*shape[:2], count))
            for layer, own in enumerate(torch.from_numpy(array).to(like.device)):
                extra[layer][name] = own.clone()
    # a policy keeps as many keys as were read, unless it evicts
    kept_before = sequence.near[0].length if sequence.layers[0].only_grows else 0
    held_tokens = kept_before + count + sequence.far.store.length(0) + far.shape[2]
    if sequence.policy.traits.kind != "evicts" and held_tokens != tokens:
        raise ValueError("its keys are not those of its tokens")
    layers = [_near_layer(part, own) for part, own in zip(near, extra, strict=True)]
    return SequenceDelta(tokens, list(far), layers, read_evicted_summary(container, sequence))


def _check_far(far: torch.Tensor, own: torch.dtype) -> None:
    """Raise if far rows do not fit a sequence's far memory of this type."""
    if far.dtype != own and not (far.dtype.is_floating_point and own.is_floating_point):
        raise SavedDocumentError(
            f"The conversation's far keys are stored as {format_name(far.dtype)} and its "
            f"document's as {format_name(own)}. Ask with --far-dtype {format_name(far.dtype)}."
        )
    if far.shape[2] % group_tokens(own):
        raise ValueError("its far keys do not fill their groups")


def _near_layer(rows: torch.Tensor, extra: dict[str, torch.Tensor]) -> NearLayer:
    """A near set without the padding of the file's arrays."""
    count = rows.shape[1]
    if "positions" in extra:
        count, *others = lengths_of(extra["positions"])
        if any(other != count for other in others):
            raise ValueError("heads have different numbers of later keys")
    own = {name: array[:, :count].clone() for name, array in extra.items()}
    return NearLayer(rows[:, :count].clone(), count, **own)


def _bytes_of(rows: torch.Tensor) -> NDArray[np.uint8]:
    rows = rows.cpu().contiguous()
    array: NDArray[np.uint8] = rows.view(torch.uint8).numpy()
    return array
