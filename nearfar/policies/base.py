"""The contract between a policy and the runtime.

A policy decides where keys are kept and which of them a decode step reads. It is a frozen dataclass
in a file of its own. Its fields are its parameters, `traits` describes it, and it overrides one of

- `victims`, if it evicts: the near tokens to drop when the near set is over its limit (or `kept`,
  if heads may keep different numbers of tokens; or `new_merger`, if rows are replaced by fewer;
  `policies/evicting.py` is the base of policies that drop the lightest tokens);
- `new_index`, if it selects: an index over the far keys that answers `select` for each query.

A policy gets keys, queries and scores as tensors and returns indices. It never sees a stream, a
model or another sequence, so it is tested without any of them. If near is a GPU, a selecting policy
may also keep its index there (`new_near_index`) and select for a whole batch by kernels alone
(`new_near_selector`); otherwise the same index as everywhere selects on the host.

The runtime promises the following. The prompt is read with exact attention. The first `sinks` and
the last `window` tokens of a sequence are near under every policy. Under a selecting policy all
others are far: they arrive through `FarIndex.extend` in token order, in blocks, also while an
answer is generated. Under an evicting policy nothing is far, and after every step `victims` brings
the near set of each layer down to sinks + window + budget tokens per KV head; with `evicts_once`
only after the first prompt, so that later tokens are kept in addition. Dropped rows are first
folded into the policy's summary of evicted rows, if it has one (`new_evicted_summary`), and every
later query reads it as one more part. Statistics of a prompt's queries that `watches` names are
gathered while the prompt is read, and passed to `score_prompt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from nearfar.config import Budget
from nearfar.errors import InvalidOptionError
from nearfar.policies.evicted_summary import EvictedSummary
from nearfar.policies.index import FarIndex, NearIndex, NearSelector
from nearfar.policies.merged_rows import MergedRows
from nearfar.records import Geometry

Kind = Literal["exact", "evicts", "selects"]
Watched = Literal["nothing", "sums", "last", "moments"]  # a field of `PromptQueryStats`
LAST_QUERIES = 128  # number of a prompt's last queries that a policy can get


@dataclass(frozen=True)
class Traits:
    """Describes a policy and its needs of the runtime."""

    kind: Kind
    summary: str  # one line for people
    source: str  # paper or definition
    keeps_far: bool  # whether tokens beyond sinks and window go to far memory
    needs_attention: bool = False  # whether near tokens carry a score made from attention
    positions: Literal["absolute", "cache-index"] = "absolute"  # what rotary embedding counts
    evicts_once: bool = False  # only after the first prompt; later tokens stay
    watches: Watched = "nothing"  # the statistics that `score_prompt` gets
    ragged: bool = False  # whether heads keep different numbers of tokens; implies evicts_once


class Moments(NamedTuple):
    """Mean [Hq, D] and covariance [Hq, D, D] float32 of queries, scaled but not rotated."""

    mean: torch.Tensor
    covariance: torch.Tensor


@dataclass(frozen=True)
class PromptQueryStats:
    """Statistics of a prompt's queries for the keys of one layer; only watched ones are set.

    ``angles`` gives cosine and sine [n, D] of positions [n]: x rotated to them is
    x cos + (x rolled by D / 2) sin.
    """

    angles: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    sums: torch.Tensor | None = None  # [Hq, N] attention that each key got from all queries
    last: torch.Tensor | None = None  # [Hq, n, D] the last n queries, rotated and scaled
    moments: Moments | None = None  # of the queries but the first few


@dataclass(frozen=True)
class NearState:
    """The view of an evicting policy on one layer of one sequence.

    ``positions`` [Hkv, C] int64 are token positions in the text, in any order, the same number for
    every KV head; ``keys`` and ``values`` [Hkv, C, D] are in this order. ``scores`` [Hkv, C]
    float32 is None unless the policy needs attention or has just scored a prompt.
    """

    positions: torch.Tensor
    scores: torch.Tensor | None
    sinks: int
    window: int
    limit: int  # tokens that may stay
    keys: torch.Tensor
    values: torch.Tensor
    layer: int = 0


Merger = Callable[[NearState], MergedRows]  # makes at most `limit` rows of the near ones


@dataclass(frozen=True)
class Policy:
    """Base of all policies; see the module's docstring for the contract."""

    name: ClassVar[str]
    traits: ClassVar[Traits]
    requires: ClassVar[tuple[str, str] | None] = None  # a module, and what pip is to install for it

    def check_model(self, geometry: Geometry) -> None:
        """Raise InvalidOptionError for a model that the policy cannot serve."""

    def contents(self) -> dict[str, str]:
        """Parameters that name something outside, like a file, as what tells its content.

        Two policies of equal `described` keep the same of the same text.
        """
        return {}

    def described(self) -> dict[str, Any]:
        """Name and parameters in JSON types, files by content: what the kept keys depend on."""
        return {"name": self.name, **dataclasses.asdict(self), **self.contents()}

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> FarIndex | None:
        """An index for one sequence; None for a policy that needs none."""
        return None

    def new_near_index(
        self, geometry: Geometry, budget: Budget, seed: int, device: torch.device
    ) -> NearIndex | None:
        """An index for one sequence on ``device``; None for a policy that selects on the host."""
        return None

    @property
    def selects_near(self) -> bool:
        """Whether the policy keeps an index on a GPU where near is one."""
        return type(self).new_near_index is not Policy.new_near_index

    def new_near_selector(
        self,
        geometry: Geometry,
        seed: int,
        batch: int,
        capacity_tokens: int,
        device: torch.device,
    ) -> NearSelector:
        """A selector for ``batch`` sequences of up to ``capacity_tokens`` far keys."""
        raise NotImplementedError(f"{self.name} has a near index but does not select from it")

    def predict_near_index_bytes(self, geometry: Geometry, num_keys: int) -> int:
        """Bytes near that `new_near_index` will hold once it has ``num_keys`` far keys."""
        return 0

    def predict_index_bytes(self, geometry: Geometry, num_keys: int) -> int:
        """Bytes that `new_index` will hold over all layers once it has ``num_keys`` far keys."""
        return 0

    def predict_working_bytes(self, geometry: Geometry, tokens: int, dtype: torch.dtype) -> int:
        """Most bytes that the policy works in at a time, beside what stays and what it is given.

        Of one that selects: while an index takes in ``tokens`` far keys, stored as ``dtype``, and
        while it selects among them. Of one that evicts: while a layer's near set of ``tokens`` is
        scored and brought down to its limit; ``dtype`` is that of near rows.
        """
        return 0

    def new_evicted_summary(
        self, geometry: Geometry, device: torch.device
    ) -> EvictedSummary | None:
        """The summary that an evicting policy keeps of dropped rows, or None."""
        return None

    def predict_evicted_summary_bytes(self, geometry: Geometry) -> int:
        """Bytes near that `new_evicted_summary` holds."""
        return 0

    def new_merger(self, geometry: Geometry, device: torch.device) -> Merger | None:
        """The merger that replaces near rows by fewer; None for a policy that does not merge.

        It is called instead of `victims`, leaves sinks and window as they are, and gives merged
        rows positions between them. If it returns fewer rows than the limit, it is called less
        than once a token.
        """
        return None

    def layer_budget(self, budget: int, layer: int, layers: int) -> int:
        """Tokens beyond sinks and window that an evicting policy keeps in ``layer``."""
        return budget

    def score_prompt(self, near: NearState, stats: PromptQueryStats) -> torch.Tensor:
        """Scores [Hkv, C] after a prompt was read. Only called if traits.watches is not empty."""
        raise NotImplementedError(f"{self.name} watches queries but does not say what for")

    def update_scores(self, scores: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """New scores [Hkv, C] from the old ones and ``attention`` [Hq, C].

        ``attention`` is that of a decoded token's queries to each near token. Only called if
        traits.needs_attention is set.
        """
        raise NotImplementedError(f"{self.name} needs attention but does not say how to use it")

    def victims(self, near: NearState) -> torch.Tensor:
        """Slots [Hkv, C - limit] of ``near`` to drop. Only called on evicting policies."""
        raise NotImplementedError(f"{self.name} evicts but does not say what")

    def kept(self, near: NearState) -> torch.Tensor:
        """Mask [Hkv, C] of rows that stay. Only called on ragged policies, not `victims`."""
        raise NotImplementedError(f"{self.name} is ragged but does not say what stays")

    def set_traits(self, **changes: Any) -> None:
        """Change ``traits`` of this instance alone, if a parameter decides them."""
        object.__setattr__(self, "traits", dataclasses.replace(type(self).traits, **changes))


def check_per(name: str, per: str) -> None:
    """Refuse a `per` that is neither of the two ways to share a selection."""
    if per not in ("group", "head"):
        raise InvalidOptionError(f"{name}'s per must be 'group' or 'head'. Got {per!r}.")
