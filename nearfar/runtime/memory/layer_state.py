"""The state that a sequence keeps for one layer: it can be marked, rewound, saved and counted.

The policy's traits decide the class of a layer's state once, when a sequence is made:

    GrowingState    every row near                                        (exact, near)
    FarState        sinks and window near, everything between them far    (selects; exact, far)
    EvictingState   at most sinks + window + budget rows near             (evicts)
    RaggedState     as evicting, but heads keep different numbers of rows (evicts, ragged)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from nearfar.policies.base import PromptQueryStats
from nearfar.runtime.memory.near_store import NearLayer
from nearfar.runtime.memory.ragged_rows import RaggedRows


class LayerState(ABC):
    """Near rows of one layer of one sequence, and their changes as tokens are added."""

    only_grows: ClassVar[bool] = False  # whether rows never change and new ones are appended
    ragged: RaggedRows | None = None  # rows of the first prompt, under a ragged policy
    near_limit: int | None = None  # mean rows over layers, set by an evicting policy's first prompt

    def __init__(self, near: NearLayer) -> None:
        self.near = near  # always the same object

    @property
    def held_tokens(self) -> int:
        """Tokens that are near or far, without those of `ragged`."""
        return self.near.length

    @property
    def near_bytes(self) -> int:
        """Bytes of near rows."""
        return self.near.rows[:, : self.near.length].nbytes

    @property
    def positions(self) -> list[torch.Tensor]:
        """Positions of the rows of each KV head, in any order; only of a policy that evicts."""
        assert self.near.positions is not None
        return list(self.near.positions[:, : self.near.length])

    @property
    def layout(self) -> Any:
        """Compares equal as long as the addresses of near rows stay the same."""
        return self.near.moves

    @property
    def is_fixed_size(self) -> bool:
        """Whether a decode step drops as many rows as it adds."""
        return False

    @abstractmethod
    def absorb(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        stats: PromptQueryStats | None,
        tokens: int,
    ) -> None:
        """Add a prompt that was read with exact attention.

        ``keys`` and ``values`` [Hkv, N, D] are the rows that the layer held, then the prompt's.
        ``stats`` are the statistics of the prompt's queries that the policy needs. The sequence had
        read ``tokens`` before.
        """

    def append(self, key: torch.Tensor, value: torch.Tensor, position: int | torch.Tensor) -> None:
        """Add one generated token, ``key`` and ``value`` [Hkv, D], at ``position`` in the text."""
        self.near.extend(key[:, None], value[:, None], position)

    def evict(self, tokens: int) -> None:  # noqa: B027  most classes evict nothing
        """Drop rows above the limit, after a token has attended to all of them."""

    def spill(self) -> None:  # noqa: B027  most classes have no far rows
        """Between two steps: move tokens that left the window to far memory."""

    def copy_past(self, rows: torch.Tensor) -> None:
        """Write the layer's rows to the front of ``rows`` [Hkv, >= held_tokens, 2 D].

        The order is that of the store: token order unless the policy evicts.
        """
        rows[:, : self.near.length] = self.near.rows[:, : self.near.length]

    def mark(self) -> Any:
        """A point for `rewind`."""
        return self.near.snapshot()

    def rewind(self, mark: Any) -> None:
        """Return to the state of ``mark``; this also drops any interrupted change."""
        self.near.restore(mark)

    def since(self, mark: Any) -> NearLayer:  # noqa: ARG002  a growing state uses it
        """A copy of the rows that `put_back` needs after a rewind to ``mark``."""
        return self.near.snapshot()

    def put_back(self, rows: NearLayer) -> None:
        """Restore the rows that `since` returned, after a rewind to the same mark."""
        self.near.restore(rows)

    def near_to_save(self) -> NearLayer:
        """The near rows that a file of the document holds."""
        return self.near

    def far_to_save(self) -> torch.Tensor | None:
        """The rows [Hkv, n, width] that a file stores as far rows; None if there are none."""
        return None

    def take_saved(self, rows: NearLayer, near_limit: int | None) -> None:
        """Restore an empty state from the ``rows`` of a file and its policy's limit.

        ``rows`` come from `near_to_save`. Raises ValueError if the policy cannot have such rows.
        """
        self.near_limit = near_limit
        self.near.extend(rows.keys, rows.values, 0)
