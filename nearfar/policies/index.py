"""An index over far keys and its selector: the contract of a policy that selects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from nearfar.records import AllOrNone, DrawnKeys, FarView, Selection, Verification

Form = dict[str, int | float | str]


class Index(ABC):
    """The state of a selecting policy for the far keys of one sequence, over all layers."""

    @abstractmethod
    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        """Add the far tokens that came since the last call (at the end of ``far``).

        ``arrived`` [Hkv, n, D] are their keys in near memory, if they are still there: the same
        numbers as in ``far`` but for its storage type, for an index that can use the GPU.
        """

    def reserve(self, tokens: int) -> None:  # noqa: B027  most grow as tokens come
        """Announce the total number of far tokens: an index may make room for them at once."""

    @abstractmethod
    def mark(self) -> Any:
        """A point to which `rewind` can return; cheap, and valid while the index only grows."""

    @abstractmethod
    def rewind(self, mark: Any) -> None:
        """Forget all tokens added since ``mark``, without a trace."""

    @abstractmethod
    def index_bytes(self) -> int:
        """Bytes held for all layers, beside the keys and values themselves."""

    def form(self) -> Form | None:
        """Identifies `arrays` and everything they depend on beside the keys: numbers and texts.

        An index with a form is saved with a document and restored into an index of an equal form;
        its `select` reads only the far rows that it selects. Without a form (None, as here) it is
        built from the keys whenever a document is opened.
        """
        return None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state of all layers. Only called on an index with a form."""
        raise NotImplementedError

    def restore(self, arrays: Mapping[str, NDArray[Any]], num_keys: int) -> None:
        """Become the state that `arrays` once gave, of ``num_keys`` far keys in every layer.

        The arrays are mapped from a file that anyone may have written: raise ValueError for any
        that `select` could not use safely. Writing to one changes neither the file nor its length.
        """
        raise NotImplementedError


class FarIndex(Index):
    """An index that selects on the host, one sequence and layer at a time."""

    @abstractmethod
    def select(
        self, layer: int, query: torch.Tensor, far: FarView, step: int
    ) -> Selection | AllOrNone:
        """Choose far keys for ``query`` [Hq, D] float32, already scaled by the softmax scale.

        ``step`` counts tokens of the sequence; with the seed it fixes every random draw.
        """

    def pop_verification(self) -> Verification | None:
        """The error estimates since the last call, of a policy that makes them; else None."""
        return None


class NearIndex(Index):
    """An index in near memory, for a `NearSelector` to select from."""

    @property
    @abstractmethod
    def layout(self) -> Any:
        """Equal as long as its arrays keep their addresses, so that kernels find them."""


class NearSelector(ABC):
    """Selection by kernels, for B sequences at a time, always with the same memory."""

    rows_per_sequence: int  # rows of heads that select together
    segment_keys: int  # far keys of a segment of `DrawnKeys`

    @abstractmethod
    def bind(self, indices: list[Any]) -> None:
        """Select for the sequences of ``indices`` from now on, in kernels launched earlier too."""

    @abstractmethod
    def start_step(self) -> None:
        """Launch the kernels that a step needs once, before its first layer."""

    @abstractmethod
    def select(
        self,
        layer: int,
        queries: torch.Tensor,
        lengths: torch.Tensor,
        wanted: torch.Tensor,
        steps: torch.Tensor,
        drawn: DrawnKeys,
    ) -> None:
        """Launch kernels that write to ``drawn`` the keys that ``queries`` [B, Hq, D] float32 read.

        Scaled queries, ``lengths`` [B] int32 of the far sets, the number ``wanted`` [B] int32 of
        keys of each KV group and ``steps`` [B] int32 are near; the kernels read them when they run.
        Nothing here may wait for the device.
        """


class Stateless(FarIndex):
    """An index that keeps nothing: `select` reads the far keys themselves, or none."""

    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        """Nothing is taken in."""

    def mark(self) -> None:
        """There is nothing to return to."""

    def rewind(self, mark: None) -> None:
        """There is nothing to forget."""

    def index_bytes(self) -> int:
        """None."""
        return 0
