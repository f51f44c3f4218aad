"""The facts in the header of a saved document."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from nearfar.policies.index import Form
from nearfar.records import Geometry
from nearfar.storage import FORMATS, token_bytes

NEAR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEX = 64  # digits of a sha256


@dataclass(frozen=True)
class Kept:
    """The evicting policy of a document that has only the keys which that policy kept."""

    policy: dict[str, Any]  # as `Policy.described` has it
    budget: float
    near_limit: int | None


@dataclass(frozen=True)
class Facts:
    """Everything about a document that is not an array."""

    model: str
    model_identity: str  # sha256 over config, weights and adapter
    tokenizer_identity: str  # sha256 over tokenizer and chat template
    text_sha256: str
    geometry: Geometry
    tokens: int
    near_dtype: str
    row_format: str  # of far rows: a token's key and then its value, in one of FORMATS
    sinks: int
    window: int
    rest: str  # end of the text that is read with a question
    read_seconds: float
    kept: Kept | None = None  # None: all keys are here, for any policy that keeps all
    indexes: tuple[Form, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Of one far token of one head in one layer."""
        return token_bytes(FORMATS[self.row_format], self.geometry.head_dim)

    @property
    def near_row_bytes(self) -> int:
        """Of one near token of one head in one layer."""
        return 2 * self.geometry.head_dim * NEAR_DTYPES[self.near_dtype].itemsize

    def identity(self, token_ids: bytes) -> str:
        """A sha256 in hex over the text and the settings of its reading, for any place."""
        values = self.as_json()
        for name in ("model", "near_dtype", "row_format", "read_seconds", "indexes"):
            del values[name]
        described = json.dumps(values, sort_keys=True).encode()
        return hashlib.sha256(described + token_ids).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """For the header."""
        return dataclasses.asdict(self)


def parse_facts(values: Any) -> Facts:
    """The facts in a header; ValueError (or TypeError, KeyError) for impossible ones."""
    values = dict(values)
    geometry = Geometry(**values.pop("geometry"))
    kept = values.pop("kept")
    facts = Facts(
        geometry=geometry,
        kept=None if kept is None else Kept(**kept),
        indexes=tuple(dict(form) for form in values.pop("indexes")),
        **values,
    )
    _check(facts)
    return facts


def _check(facts: Facts) -> None:
    geometry = facts.geometry
    sizes = dataclasses.astuple(geometry)
    texts = (facts.model, facts.model_identity, facts.tokenizer_identity, facts.rest)
    counts = (facts.tokens, facts.sinks, facts.window)
    limit = None if facts.kept is None else facts.kept.near_limit
    _require(all(_is_count(size) and size > 0 for size in sizes))
    _require(geometry.query_heads % geometry.kv_heads == 0)
    _require(all(isinstance(text, str) for text in texts) and len(facts.text_sha256) == _HEX)
    "".join(texts).encode()  # JSON can say halves of characters, and tokenizers refuse them
    _require(all(_is_count(count) for count in counts) and facts.window > 0)
    _require(facts.near_dtype in NEAR_DTYPES and facts.row_format in FORMATS)
    _require(type(facts.read_seconds) in (int, float) and facts.read_seconds >= 0)
    _require(limit is None or _is_count(limit))
    if facts.kept is not None:
        _require(isinstance(facts.kept.policy.get("name"), str))
        _require(type(facts.kept.budget) in (int, float) and facts.kept.budget > 0)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("a value of the header is impossible")
