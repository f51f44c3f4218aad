"""The memory that a decode step on the GPU and the threads of the host share."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

Array = NDArray[Any]

FLAG_WORDS = 16  # a flag has a cache line of its own


class Mailbox(NamedTuple):
    """The shared arrays, for L micro-batches of B sequences; the first seven are pinned.

    R rows of Gr query heads select together; their keys are read in F parts.
    """

    ready: Array  # [L, FLAG_WORDS] int32: layers asked for
    done: Array  # [L, FLAG_WORDS] int32: layers answered
    host_queries: Array  # [L, B, Hq, D] float32: queries, scaled
    chosen: Array  # [L, R, segments, keys of a segment] int64: index, bits of its log-weight above
    counts: Array  # [L, R, segments, 2] int32: in `chosen`, and fetched by the GPU
    out: Array  # [L, R, F, Gr, D] float32
    lse: Array  # [L, R, F, Gr] float32
    addresses: Array  # [L, B, layers] int64: of far rows
    head_strides: Array  # [L, B] int64, in numbers
    lengths: Array  # [L, B] int64: far tokens
    arrivals: Array  # [L, FLAG_WORDS] int64: threads that have finished a layer, all layers
    rows_read: Array  # [threads, FLAG_WORDS] int64: far rows read, and groups that they were in
    stamps: Array  # [L, layers, 2] int64: nanoseconds at which a layer was seen and was answered
    control: Array  # [FLAG_WORDS] int64


class FarRowLayout(NamedTuple):
    """How far rows are read; the same in every layer."""

    block: tuple[int, ...]  # from `attend_tile.head_block` of the heads that select together
    everything: bool  # all rows instead of those chosen
    kv_heads: int
    rows: Array  # [0, width], of the type that rows have for kernels
    group_tokens: int  # that have something stored in common; 1: none have
    layers: int
    micro_batches: int
    threads: int
