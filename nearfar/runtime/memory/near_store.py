"""Keys and values that stay near: sinks, window, and whatever else the policy keeps.

Rows are laid out as in far memory, one token's K and V side by side, so the same kernels read
both. The order of rows is the order of tokens until an evicting policy drops some; such a store
also keeps each row's position in the text and, where the policy needs it, a score.
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
    # how often its arrays were others: an address alone may come again
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

        A position that is a tensor, of one token, is not looked at here: a graph may hold it.
        """
        count = keys.shape[1]
        self.reserve(self.length + count)
        span = slice(self.length, self.length + count)
        D = keys.shape[2]
        self.rows[:, span, :D] = keys
        self.rows[:, span, D:] = values
        if self.positions is not None:
            self.positions[:, span] = _consecutive(first_position, count, self.rows.device)
        if self.scores is not None:
            self.scores[:, span] = 0.0
        self.length += count

    def take_prompt(self, keys: torch.Tensor, values: torch.Tensor, first_position: int) -> None:
        """Add a prompt, ``keys`` and ``values`` [Hkv, N, D], of which the first rows are there.

        An empty layer holds the prompt's own array if its rows lie as near rows do: of a long
        prompt a copy would be the most that a layer takes.
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
        if self.positions is not None:
            self.positions[:, : self.length] = _consecutive(
                first_position, self.length, rows.device
            )
        if self.scores is not None:
            self.scores[:, : self.length] = 0.0

    def take_in(self, position: int) -> None:
        """Count a row that was written behind the others, of the token at ``position``."""
        if self.positions is not None:
            self.positions[:, self.length] = position
        self.length += 1

    def pick(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hkv, m, D] of ``slots`` [Hkv, m], copied."""
        heads = torch.arange(len(slots), device=slots.device)[:, None]
        keys, values = self.rows[heads, slots].chunk(2, dim=-1)
        return keys, values

    def drop(self, victims: torch.Tensor, *, in_place: bool = False) -> None:
        """Drop ``victims`` [Hkv, m] slots; with one a head, its slot takes the newest row.

        ``in_place``: the others stay in the arrays that they are in, unless much room would be left
        over. A graph that was captured knows these.
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
            if in_place and self.rows.shape[1] <= _rounded(remaining + growth_tokens(remaining)):
                for (_, array), (_, left) in zip(self._arrays(), kept, strict=True):
                    array[:, :remaining] = left
            else:  # a prompt's rows must not stay reserved
                self._hold(kept)
        self.length -= victims.shape[1]

    def replace(self, rows: MergedRows, capacity_tokens: int) -> None:
        """Hold ``rows`` and no others, with room for so many in all."""
        self.length = rows.rows.shape[1]
        new = {"rows": rows.rows, "positions": rows.positions, "scores": rows.scores}
        self._hold(
            (name, _with_room(new[name], array, self.length, capacity_tokens))
            for name, array in self._arrays()
        )

    def drop_range(self, start: int, stop: int) -> None:
        """Drop consecutive rows and close the gap; the order of the others stays."""
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
        """A copy that later changes do not touch."""
        return NearLayer(
            self.rows[:, : self.length].clone(),
            self.length,
            None if self.positions is None else self.positions[:, : self.length].clone(),
            None if self.scores is None else self.scores[:, : self.length].clone(),
        )

    def restore(self, saved: NearLayer) -> None:
        """Become what ``saved`` holds."""
        if self._capacity < saved.length:
            capacity = _rounded(saved.length)
            self._hold(
                (name, array.new_empty(array.shape[0], capacity, *array.shape[2:]))
                for name, array in self._arrays()
            )
        self.length = saved.length
        for (_, array), (_, old) in zip(self._arrays(), saved._arrays(), strict=True):
            array[:, : saved.length] = old

    @property
    def _capacity(self) -> int:
        """Tokens for which there is room, also where growing was interrupted half way."""
        return min(array.shape[1] for _, array in self._arrays())

    def _arrays(self) -> list[tuple[str, torch.Tensor]]:
        named = (("rows", self.rows), ("positions", self.positions), ("scores", self.scores))
        return [(name, array) for name, array in named if array is not None]

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens; the rows move where there is none."""
        capacity = self._capacity
        if length <= capacity:
            return
        grown = _rounded(max(length, capacity + growth_tokens(capacity)))
        self._hold((name, _with_room(old, old, self.length, grown)) for name, old in self._arrays())

    def _hold(self, arrays: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hold these by name, and not what was there."""
        for name, array in arrays:
            setattr(self, name, array)
        self.moves += 1


def _with_room(
    rows: torch.Tensor, like: torch.Tensor, length: int, capacity_tokens: int
) -> torch.Tensor:
    """The first ``length`` of ``rows`` in an array ``like`` another, with room for so many."""
    made = like.new_empty(like.shape[0], capacity_tokens, *like.shape[2:])
    made[:, :length] = rows[:, :length]
    return made


def _whole_rows(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
    """The array [Hkv, capacity, 2 D] that ``keys`` and ``values`` are the rows of, if it is one."""
    Hkv, n, D = keys.shape
    behind = keys.data_ptr() + D * keys.element_size()
    if values.data_ptr() != behind or keys.stride() != values.stride() or keys.stride(1) != 2 * D:
        return None
    capacity = _rounded(n)
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


def _rounded(tokens: int) -> int:
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
    shape = (geometry.kv_heads, _rounded(capacity_tokens))
    return NearLayer(
        torch.empty(*shape, 2 * geometry.head_dim, dtype=dtype, device=device),
        0,
        torch.empty(shape, dtype=torch.int64, device=device) if with_positions else None,
        torch.empty(shape, dtype=torch.float32, device=device) if with_scores else None,
    )


def stacked(layers: list[NearLayer]) -> dict[str, torch.Tensor]:
    """Rows, and where there are any positions and scores, [layers, Hkv, C, ...] of all layers.

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
    """Rows of each head that are there, of ``positions`` [Hkv, C] as `stacked` gives them.

    Raises ValueError where what is missing is not at the end.
    """
    there = positions >= 0
    counts: list[int] = there.sum(1).tolist()
    for head, count in zip(there, counts, strict=True):
        if not head[:count].all():
            raise ValueError("its near keys have holes")
    return counts
