"""What a sequence keeps of one layer, and the four operations on it: mark, rewind, save, count.

Which of these a layer has is chosen once, from the policy's traits, when a sequence is made:

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
    """Near rows of one layer of one sequence, and how they change as tokens come."""

    only_grows: ClassVar[bool] = False  # whether rows stay as they are and others come behind them
    ragged: RaggedRows | None = None  # what heads keep of a first prompt, of a ragged policy
    near_limit: int | None = None  # rows in the mean over layers, once an evicting policy knows it

    def __init__(self, near: NearLayer) -> None:
        self.near = near  # always the same object

    @property
    def held_tokens(self) -> int:
        """Tokens that are near or far; those of `ragged` are not among them."""
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
        """Compares equal as long as near rows lie where they lay."""
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
        """Take in a prompt that was read with exact attention.

        ``keys`` and ``values`` [Hkv, N, D] are what the layer held and then the prompt; ``stats``
        is what the prompt's queries tell about them, where the policy watches. The sequence had
        read ``tokens`` before.
        """

    def append(self, key: torch.Tensor, value: torch.Tensor, position: int | torch.Tensor) -> None:
        """Take in one generated token, ``key`` and ``value`` [Hkv, D], of the text's position."""
        self.near.extend(key[:, None], value[:, None], position)

    def evict(self, tokens: int) -> None:  # noqa: B027  most keep all that they have near
        """Bring the near set down to its limit, after a token has attended to all of it."""

    def spill(self) -> None:  # noqa: B027  most have nothing far
        """Between two steps: move what left the window to far memory."""

    def copy_past(self, rows: torch.Tensor) -> None:
        """Write what the layer holds to the front of ``rows`` [Hkv, >= held_tokens, 2 D].

        Rows are as stored: in token order unless the policy evicts.
        """
        rows[:, : self.near.length] = self.near.rows[:, : self.near.length]

    def mark(self) -> Any:
        """A point for `rewind`."""
        return self.near.snapshot()

    def rewind(self, mark: Any) -> None:
        """Become what ``mark`` holds; any interrupted change is forgotten too."""
        self.near.restore(mark)

    def since(self, mark: Any) -> NearLayer:  # noqa: ARG002  a growing state looks at it
        """A copy of what `put_back` needs to bring the state back from ``mark``."""
        return self.near.snapshot()

    def put_back(self, rows: NearLayer) -> None:
        """Become what `since` gave, after a rewind to the same mark."""
        self.near.restore(rows)

    def near_to_save(self) -> NearLayer:
        """The near rows that a file of the document holds."""
        return self.near

    def far_to_save(self) -> torch.Tensor | None:
        """The rows [Hkv, n, width] that a file holds as far ones, as stored; None: it has none."""
        return None

    def take_saved(self, rows: NearLayer, near_limit: int | None) -> None:
        """Become what a file holds: an empty state takes ``rows`` and the limit of its policy.

        ``rows`` are as `near_to_save` gave them. Raises ValueError where the policy has no such.
        """
        self.near_limit = near_limit
        self.near.extend(rows.keys, rows.values, 0)
