"""Keys and values in near (GPU) memory: sinks, window, and the rows that an evicting policy keeps.

The layout of rows is that of far memory, one token's K and V side by side, so the same kernels read
both. Rows are in token order until an evicting policy drops some. Under such a policy the store
also keeps each row's position in the text and, if the policy needs it, a score.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from nearfar.policies.merged_rows import MergedRows
from nearfar.records import FarView, Geometry

GROWTH_TOKENS = 256


@dataclass
class NearLayer:
    """One layer of one sequence."""

    rows: torch.Tensor  # [Hkv, capacity, 2 D]
    length: int = 0
    positions: torch.Tensor | None = None  # [Hkv, capacity] int64
    scores: torch.Tensor | None = None  # [Hkv, capacity] float32
    # counts replacements of the arrays: a new array may get an old one's address
    moves: int = field(default=0, init=False, compare=False)

    @property
    def keys(self) -> torch.Tensor:
        """Keys [Hkv, length, D], not copied."""
        return self.rows[:, : self.length, : self.rows.shape[2] // 2]

    @property
    def values(self) -> torch.Tensor:
        """Values [Hkv, length, D], not copied."""
        return self.rows[:, : self.length, self.rows.shape[2] // 2 :]

    def view(self) -> FarView:
        """The same rows for a CPU kernel."""
        return FarView(self.rows, self.length)

    def extend(
        self, keys: torch.Tensor, values: torch.Tensor, first_position: int | torch.Tensor
    ) -> None:
        """Add tokens, ``keys`` and ``values`` [Hkv, n, D], with consecutive positions.

        A position that is a tensor, for one token, is not read here: a graph may contain it.
        """
        count = keys.shape[1]
        self.reserve(self.length + count)
        span = slice(self.length, self.length + count)
        D = keys.shape[2]
        self.rows[:, span, :D] = keys
        self.rows[:, span, D:] = values
        self._describe(span, first_position)
        self.length += count

    def take_prompt(self, keys: torch.Tensor, values: torch.Tensor, first_position: int) -> None:
        """Add a prompt, ``keys`` and ``values`` [Hkv, N, D]; the layer has its first rows already.

        An empty layer takes the prompt's own array if its layout is that of near rows: for a long
        prompt a copy would be the largest allocation of the layer.
        """
        rows = _whole_rows(keys, values)
        if self.length or rows is None or keys.shape[1] <= self._capacity:
            self.extend(keys[:, self.length :], values[:, self.length :], first_position)
            return
        room = {"rows": rows}
        for name, array in self._arrays():
            if name not in room:
                room[name] = array.new_empty(*rows.shape[:2])
        self._hold(room.items())
        self.length = keys.shape[1]
        self._describe(slice(0, self.length), first_position)

    def _describe(self, span: slice, first_position: int | torch.Tensor) -> None:
        """Set the positions, which are consecutive, and the first scores of new rows."""
        if self.positions is not None:
            count = span.stop - span.start
            self.positions[:, span] = _consecutive(first_position, count, self.rows.device)
        if self.scores is not None:
            self.scores[:, span] = 0.0

    def commit_token(self, position: int) -> None:
        """Count a row that a kernel has appended, for the token at ``position``."""
        if self.positions is not None:
            self.positions[:, self.length] = position
        self.length += 1

    def pick(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hkv, m, D] of ``slots`` [Hkv, m], copied."""
        heads = torch.arange(len(slots), device=slots.device)[:, None]
        keys, values = self.rows[heads, slots].chunk(2, dim=-1)
        return keys, values

    def drop(self, victims: torch.Tensor, *, in_place: bool = False) -> None:
        """Drop ``victims`` [Hkv, m] slots; if m is 1, the newest row moves to the free slot.

        With ``in_place`` the other rows stay in their arrays, unless much room would be left over:
        a captured graph contains the addresses of these arrays.
        """
        if victims.shape[1] == 1:
            last = self.length - 1
            heads = torch.arange(victims.shape[0], device=victims.device)
            for _, array in self._arrays():
                array[heads, victims[:, 0]] = array[:, last]
        else:
            keep = torch.ones(
                victims.shape[0], self.length, dtype=torch.bool, device=victims.device
            )
            keep.scatter_(1, victims, False)
            remaining = self.length - victims.shape[1]
            kept = [
                (
                    name,
                    array[:, : self.length][keep].view(len(victims), remaining, *array.shape[2:]),
                )
                for name, array in self._arrays()
            ]
            if in_place and self.rows.shape[1] <= rounded_tokens(
                remaining + growth_tokens(remaining)
            ):
                for (_, array), (_, left) in zip(self._arrays(), kept, strict=True):
                    array[:, :remaining] = left
            else:  # the memory of a prompt's rows must be freed
                self._hold(kept)
        self.length -= victims.shape[1]

    def replace(self, rows: MergedRows, capacity_tokens: int) -> None:
        """Replace all rows by ``rows``, with room for ``capacity_tokens``."""
        self.length = rows.rows.shape[1]
        new = {"rows": rows.rows, "positions": rows.positions, "scores": rows.scores}
        self._hold(
            (name, _with_room(new[name], array, self.length, capacity_tokens))
            for name, array in self._arrays()
        )

    def drop_range(self, start: int, stop: int) -> None:
        """Drop consecutive rows and close the gap; the other rows keep their order."""
        moved = self.length - stop
        for _, array in self._arrays():
            array[:, start : start + moved] = array[:, stop : self.length].clone()
        self.length -= stop - start

    def clear(self) -> None:
        """Drop all rows and give their memory back."""
        self._hold(
            (name, array.new_empty(array.shape[0], 0, *array.shape[2:]))
            for name, array in self._arrays()
        )
        self.length = 0

    def snapshot(self) -> NearLayer:
        """A copy that later changes do not affect."""
        return NearLayer(
            self.rows[:, : self.length].clone(),
            self.length,
            None if self.positions is None else self.positions[:, : self.length].clone(),
            None if self.scores is None else self.scores[:, : self.length].clone(),
        )

    def restore(self, saved: NearLayer) -> None:
        """Return to the state of ``saved``."""
        if self._capacity < saved.length:
            capacity = rounded_tokens(saved.length)
            self._hold(
                (name, array.new_empty(array.shape[0], capacity, *array.shape[2:]))
                for name, array in self._arrays()
            )
        self.length = saved.length
        for (_, array), (_, old) in zip(self._arrays(), saved._arrays(), strict=True):
            array[:, : saved.length] = old

    @property
    def _capacity(self) -> int:
        """Tokens for which there is room, also after an interrupted growth."""
        return min(array.shape[1] for _, array in self._arrays())

    def _arrays(self) -> list[tuple[str, torch.Tensor]]:
        named = (("rows", self.rows), ("positions", self.positions), ("scores", self.scores))
        return [(name, array) for name, array in named if array is not None]

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens; rows move to larger arrays if there is too little."""
        capacity = self._capacity
        if length <= capacity:
            return
        grown = rounded_tokens(max(length, capacity + growth_tokens(capacity)))
        self._hold((name, _with_room(old, old, self.length, grown)) for name, old in self._arrays())

    def _hold(self, arrays: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the arrays of these names."""
        for name, array in arrays:
            setattr(self, name, array)
        self.moves += 1


def _with_room(
    rows: torch.Tensor, like: torch.Tensor, length: int, capacity_tokens: int
) -> torch.Tensor:
    """The first ``length`` of ``rows`` in a new and larger array of the type of ``like``."""
    made = like.new_empty(like.shape[0], capacity_tokens, *like.shape[2:])
    made[:, :length] = rows[:, :length]
    return made


def are_side_by_side(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether ``keys`` and ``values`` [Hkv, n, D] are the two halves of the same rows."""
    D = keys.shape[2]
    behind = keys.data_ptr() + D * keys.element_size()
    return (
        values.data_ptr() == behind and keys.stride() == values.stride() and keys.stride(1) == 2 * D
    )


def _whole_rows(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
    """The array [Hkv, capacity, 2 D] of which ``keys`` and ``values`` are views, or None."""
    Hkv, n, D = keys.shape
    if not are_side_by_side(keys, values):
        return None
    capacity = rounded_tokens(n)
    whole = keys.untyped_storage().nbytes() == Hkv * capacity * 2 * D * keys.element_size()
    if keys.storage_offset() or keys.stride(0) != capacity * 2 * D or not whole:
        return None
    return keys.as_strided((Hkv, capacity, 2 * D), (capacity * 2 * D, 2 * D, 1))


def growth_tokens(tokens: int) -> int:
    """Room beyond ``tokens``: an eighth keeps copying below one row in eight."""
    return max(GROWTH_TOKENS, tokens // 8)


def _consecutive(first: int | torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    if isinstance(first, torch.Tensor):
        return first
    return torch.arange(first, first + count, device=device)


def rounded_tokens(tokens: int) -> int:
    """Capacity for ``tokens``: a GPU kernel reads heads that start on multiples of 16 numbers."""
    return -(-tokens // 8) * 8


def new_near_layer(
    geometry: Geometry,
    capacity_tokens: int,
    place: tuple[torch.dtype, torch.device],
    *,
    with_positions: bool,
    with_scores: bool,
) -> NearLayer:
    """An empty layer whose rows have the type and the device of ``place``."""
    dtype, device = place
    shape = (geometry.kv_heads, rounded_tokens(capacity_tokens))
    return NearLayer(
        torch.empty(*shape, 2 * geometry.head_dim, dtype=dtype, device=device),
        0,
        torch.empty(shape, dtype=torch.int64, device=device) if with_positions else None,
        torch.empty(shape, dtype=torch.float32, device=device) if with_scores else None,
    )


def stacked(layers: list[NearLayer]) -> dict[str, torch.Tensor]:
    """Rows, and positions and scores if there are any, of all layers: [layers, Hkv, C, ...].

    C is the largest length. Shorter layers end in rows of 0 at position -1.
    """
    C = max(layer.length for layer in layers)
    found: dict[str, list[torch.Tensor]] = {}
    for layer in layers:
        for name, array in layer._arrays():
            own = array[:, : layer.length]
            missing = own.new_full((len(own), C - layer.length, *own.shape[2:]), 0)
            if name == "positions":
                missing.fill_(-1)
            found.setdefault(name, []).append(torch.cat([own, missing], 1))
    return {name: torch.stack(arrays) for name, arrays in found.items()}


def lengths_of(positions: torch.Tensor) -> list[int]:
    """The number of rows of each head, from ``positions`` [Hkv, C] as `stacked` returns them.

    Raises ValueError if a position is missing before the end.
    """
    there = positions >= 0
    counts: list[int] = there.sum(1).tolist()
    for head, count in zip(there, counts, strict=True):
        if not head[:count].all():
            raise ValueError("its near keys have holes")
    return counts
