"""Hash tables over the far keys of one layer, growing with them.

Keys are hashed less their mean (`centre`), each KV head its own. Tables come in segments of at most
65,535 keys, so ids and bucket starts take 16 bits each whatever the context: at 150 tables a key
costs 300 bytes, of 512 for its own K and V at D 128 in bfloat16. The newest keys wait as plain
codes, the tail, which costs the same and is compared code by code; once it is long it is merged
into the last segment, which needs no hashing again.

A `LayerTables` never changes but for the unused end of its tail. An older one therefore stays valid
while newer ones are made from it, and returning to it is an assignment. This module does not weigh
collisions or choose candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar.cpu_kernels.buckets import collect_from_buckets, collect_from_codes, merge_buckets
from nearfar.lsh.projections import Projections
from nearfar.records import FarView

SEGMENT_TOKENS = 65_535  # the most that a 16-bit start can point behind
MIN_TAIL_TOKENS = 1024
TAIL_SHARE = 8  # a tail may have 1/8 of the last segment's keys
RECENTRE_GROWTH = 4  # the centre is computed again after this growth of the far keys
SUM_TOKENS = 4096  # keys that are converted to float32 together


@dataclass(frozen=True)
class Segment:
    """Tables of up to 65,535 neighbouring tokens in the form of `cpu_kernels.buckets`."""

    ids: NDArray[np.uint16]  # [Hkv, num_tables, n], counted from the segment's first token
    starts: NDArray[np.uint16]  # [Hkv, num_tables, 2^bits_per_table + 1]

    @property
    def tokens(self) -> int:
        """Keys of each KV head in this segment."""
        return int(self.ids.shape[2])


@dataclass(frozen=True)
class LayerTables:
    """All far keys of one layer: segments in token order, then the tail."""

    centre: NDArray[np.float32]  # [Hkv, D]: mean of the first `centred_on` keys
    centred_on: int
    segments: tuple[Segment, ...]  # all but the last are full
    tail: NDArray[np.uint16]  # [Hkv, num_tables, capacity] codes, of which `tail_tokens` count
    tail_tokens: int

    @property
    def length(self) -> int:
        """Tokens in the tables."""
        return sum(segment.tokens for segment in self.segments) + self.tail_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        tables = sum(segment.ids.nbytes + segment.starts.nbytes for segment in self.segments)
        return self.centre.nbytes + self.tail.nbytes + tables


def empty_tables(kv_heads: int, head_dim: int, num_tables: int) -> LayerTables:
    """Tables of no keys."""
    return LayerTables(
        centre=np.zeros((kv_heads, head_dim), np.float32),
        centred_on=0,
        segments=(),
        tail=np.empty((kv_heads, num_tables, 0), np.uint16),
        tail_tokens=0,
    )


def tables_bytes(
    kv_heads: int, head_dim: int, bits_per_table: int, num_tables: int, tokens: int
) -> int:
    """Bytes of `LayerTables` of ``tokens`` tokens, added at once."""
    full, rest = divmod(tokens, SEGMENT_TOKENS)
    segments = full + (rest > MIN_TAIL_TOKENS)
    starts = segments * ((1 << bits_per_table) + 1)
    return kv_heads * (num_tables * 2 * (tokens + starts) + head_dim * 4)


def extend_tables(tables: LayerTables, projections: Projections, far: FarView) -> LayerTables:
    """Tables of all keys of ``far``, of which ``tables`` has the first ones.

    If the far set has grown fourfold since its centre was computed, all keys are centred and hashed
    again: the total cost is a third more than hashing each key once.
    """
    if far.length < tables.length:
        raise ValueError(
            f"Far memory has {far.length} tokens, the index {tables.length}. Rewind it first."
        )
    if far.length == tables.length:
        return tables
    if far.length >= RECENTRE_GROWTH * tables.centred_on:
        kv_heads, num_tables, _ = tables.tail.shape
        tables = replace(
            empty_tables(kv_heads, far.head_dim, num_tables),
            centre=mean_key(far),
            centred_on=far.length,
        )
    while tables.length < far.length:
        tables = _take_block(tables, projections, far)
    return tables


def mean_key(far: FarView) -> NDArray[np.float32]:
    """Mean [Hkv, D] of the keys of each KV head, summed in float64."""
    total = torch.zeros(far.rows.shape[0], far.head_dim, dtype=torch.float64)
    for start in range(0, far.length, SUM_TOKENS):
        total += far.keys(start, min(start + SUM_TOKENS, far.length)).double().sum(1)
    return (total / far.length).float().numpy()


def _take_block(tables: LayerTables, projections: Projections, far: FarView) -> LayerTables:
    """Hash as many new keys as the last segment has room for, and merge the tail if it is long."""
    start = tables.length
    last = _open_tokens(tables)
    count = min(far.length - start, SEGMENT_TOKENS - last - tables.tail_tokens)
    tail_tokens = tables.tail_tokens + count
    tail = _with_room(tables.tail, tables.tail_tokens, tail_tokens)
    centres = torch.from_numpy(tables.centre)
    for first in range(0, count, SUM_TOKENS):  # whole chunks of those that are hashed together
        keys = far.keys(start + first, start + min(first + SUM_TOKENS, count))
        for head, centre in enumerate(centres):
            codes = (tail[head], tables.tail_tokens + first)
            projections.write_codes(keys[head].float() - centre, *codes)
    tables = replace(tables, tail=tail, tail_tokens=tail_tokens)
    full = last + tail_tokens == SEGMENT_TOKENS
    if full or tail_tokens > max(MIN_TAIL_TOKENS, last // TAIL_SHARE):
        return _merge_tail(tables, projections)
    return tables


def _open_tokens(tables: LayerTables) -> int:
    """Tokens of the last segment if it has room, else 0."""
    last = tables.segments[-1].tokens if tables.segments else 0
    return 0 if last == SEGMENT_TOKENS else last


def _with_room(tail: NDArray[np.uint16], used: int, wanted: int) -> NDArray[np.uint16]:
    """``tail`` with a capacity of ``wanted`` tokens or more; capacities double."""
    kv_heads, num_tables, capacity = tail.shape
    if wanted <= capacity:
        return tail
    larger = np.empty((kv_heads, num_tables, max(wanted, 2 * capacity)), np.uint16)
    larger[:, :, :used] = tail[:, :, :used]
    return larger


def _merge_tail(tables: LayerTables, projections: Projections) -> LayerTables:
    """The same keys with an empty tail. Arrays of ``tables`` are read only."""
    kv_heads, num_tables, _ = tables.tail.shape
    buckets = 2**projections.bits_per_table
    closed, opened = tables.segments, _open_tokens(tables)
    if opened:
        closed, old = closed[:-1], closed[-1]
    else:
        old = Segment(
            np.empty((kv_heads, num_tables, 0), np.uint16),
            np.zeros((kv_heads, num_tables, buckets + 1), np.uint16),
        )
    new = Segment(
        np.empty((kv_heads, num_tables, opened + tables.tail_tokens), np.uint16),
        np.empty_like(old.starts),
    )
    merge_buckets(old.ids, old.starts, tables.tail, tables.tail_tokens, new.ids, new.starts)
    empty = np.empty((kv_heads, num_tables, 0), np.uint16)
    return replace(tables, segments=(*closed, new), tail=empty, tail_tokens=0)


@dataclass
class Workspace:
    """Scratch of a search, kept from one search to the next and grown if it is too small."""

    query_heads: int
    num_tables: int
    min_collisions: int
    seen: NDArray[np.uint64] = field(init=False)  # [Hq, min_collisions, keys of a segment / 64]
    counts: NDArray[np.unsignedinteger] = field(init=False)  # [Hq, keys of a tail]
    found: NDArray[np.int32] = field(init=False)  # [Hq, room]

    def __post_init__(self) -> None:
        counter = np.uint8 if self.num_tables < 2**8 else np.uint16
        self.seen = np.empty((self.query_heads, self.min_collisions, 0), np.uint64)
        self.counts = np.empty((self.query_heads, 0), counter)
        self.found = np.empty((self.query_heads, 0), np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.seen.nbytes + self.counts.nbytes + self.found.nbytes

    def reserve(self, segment_keys: int, tail_keys: int, room: int) -> None:
        """Make place for the keys of a segment and of a tail, and for candidates in each row."""
        words = -(-segment_keys // 64)
        if words > self.seen.shape[2]:
            self.seen = np.empty((self.query_heads, self.min_collisions, words), np.uint64)
        if tail_keys > self.counts.shape[1]:
            self.counts = np.empty((self.query_heads, tail_keys), self.counts.dtype)
        if room > self.found.shape[1]:
            self.found = np.empty((self.query_heads, room), np.int32)


def find_candidates(
    tables: LayerTables, query_codes: NDArray[np.uint16], workspace: Workspace
) -> NDArray[np.int64]:
    """List in ``workspace.found`` the keys that collide with the query in enough tables.

    ``query_codes`` is [num_tables, Hq]. Returns the number [Hq] of candidates of each query head;
    their token indices are the first entries of its row, ascending.
    """
    longest = max([0, *(segment.tokens for segment in tables.segments)])
    workspace.reserve(longest, tables.tail_tokens, 1)
    threshold = workspace.min_collisions
    while True:
        lengths = np.zeros(workspace.query_heads, np.int64)
        place = (workspace.found, lengths)
        first = 0
        for segment in tables.segments:
            tables_of = (segment.ids, segment.starts, first)
            collect_from_buckets(*tables_of, query_codes, threshold, workspace.seen, *place)
            first += segment.tokens
        if tables.tail_tokens:
            tail = (tables.tail, tables.tail_tokens, first)
            collect_from_codes(*tail, query_codes, threshold, workspace.counts, *place)
        most = int(lengths.max())
        if most <= workspace.found.shape[1]:
            return lengths
        workspace.reserve(0, 0, 2 * most)
