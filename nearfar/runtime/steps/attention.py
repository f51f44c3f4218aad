"""Hybrid attention of one decoded token in one layer of one sequence.

    host   q ──► select ──► attend_far ──┐
    near   q ──► attend_near ────────────┴──► merge

Near memory is the GPU's. Its part is launched first and runs while the host attends to far (host)
memory. On a machine without a GPU both parts run in host memory, one after the other.
"""

from __future__ import annotations

import numpy as np
import torch

from nearfar.cpu_kernels import attend as host
from nearfar.cpu_kernels import merge as host_merge
from nearfar.gpu_kernels import attend_near as device
from nearfar.records import AllOrNone, Partial, Selection
from nearfar.runtime.memory.evicting_state import EvictingState
from nearfar.runtime.memory.near_store import NearLayer
from nearfar.runtime.memory.ragged_rows import RaggedRows
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.rope import Angles, Rotary, rotate


def attend(layer: int, query: torch.Tensor, sequence: Sequence, decoder: Decoder) -> Partial:
    """Attention of ``query`` [Hq, D] float32 (rotated, scaled) over all that the policy reads."""
    if sequence.far.index is None:  # nothing is far
        return attend_near(layer, query, sequence, decoder)
    # before the launch of the near part: on a GPU the copy waits for all earlier launches
    on_host = query.cpu()
    near = attend_near(layer, query, sequence, decoder)
    far = attend_far(layer, on_host, sequence)
    if far is None:
        return near
    return merge(near, Partial(far.out.to(query.device), far.lse.to(query.device)))


def attend_near(layer: int, query: torch.Tensor, sequence: Sequence, decoder: Decoder) -> Partial:
    """The part over near rows: sinks, window and the rows that an evicting policy keeps."""
    state, near = sequence.layers[layer], sequence.near[layer]
    if state.ragged is not None:
        return merge(_attend_rows(query, near), attend_ragged(query, state.ragged))
    if isinstance(state, EvictingState) and near.scores is not None:
        partial, attention = device.attend_near_scored(query, near.keys, near.values)
        state.observe(attention)
        return _with_evicted_summary(layer, query, sequence, partial)
    if sequence.settings.counts_cache_slots and decoder.uses_rope(layer):
        keys = rotate(near.keys, slot_angles(sequence, layer, decoder.rotary(layer)))
        return device.attend_near(query, keys, near.values)
    return _with_evicted_summary(layer, query, sequence, _attend_rows(query, near))


def _with_evicted_summary(
    layer: int, query: torch.Tensor, sequence: Sequence, partial: Partial
) -> Partial:
    """``partial`` merged with attention to the policy's summary of dropped rows."""
    if sequence.evicted_summary is None:
        return partial
    part = sequence.evicted_summary.attend(layer, query[:, None])
    return merge(partial, Partial(part.out[:, 0], part.lse[:, 0]))


def _attend_rows(query: torch.Tensor, near: NearLayer) -> Partial:
    if query.device.type == "cpu":
        return host.attend_all(query, near.view())
    return device.attend_near(query, near.keys, near.values)


def attend_ragged(query: torch.Tensor, ragged: RaggedRows) -> Partial:
    """Attention of ``query`` [Hq, D] over the rows that each KV head keeps of the first prompt."""
    if query.device.type == "cpu":
        return host.attend_selected(query, ragged.view(), ragged.selection)
    D = query.shape[1]
    parts = [
        device.attend_near(own, rows[None, :, :D], rows[None, :, D:])
        for own, rows in zip(query.chunk(len(ragged.heads)), ragged.heads, strict=True)
    ]
    return Partial(torch.cat([part.out for part in parts]), torch.cat([p.lse for p in parts]))


def attend_far(layer: int, query: torch.Tensor, sequence: Sequence) -> Partial | None:
    """The part over far keys, on the host like ``query``; None if there are none to read."""
    selection = sequence.far.select(layer, query, sequence.tokens)
    if selection is AllOrNone.NONE:
        return None
    far = sequence.far.store.view(layer)
    if selection is AllOrNone.ALL:
        rows = far.length * far.rows.shape[0]
        sequence.far.rows_read += rows
        sequence.far.groups_read += rows // sequence.far.store.group_tokens
        return host.attend_all(query, far)
    sequence.far.rows_read += len(selection.indices)
    sequence.far.groups_read += groups_read(selection, sequence.far.store.group_tokens)
    read = host.attend_selected(query, far, selection)
    if selection.estimate is None:
        return read
    return host_merge.merge_partials(read, selection.estimate)


def groups_read(selection: Selection, tokens: int) -> int:
    """How often the keys of a selection, in order, enter another group of ``tokens`` tokens."""
    changes = np.diff(selection.indices // tokens) != 0
    starts = selection.offsets[:-1][np.diff(selection.offsets) > 0]
    changes[starts[1:] - 1] = True  # each row begins anew
    return int(changes.sum()) + min(1, len(starts))


def merge(near: Partial, far: Partial) -> Partial:
    """Both parts as one, exactly."""
    merge_there = host_merge.merge_partials if near.out.is_cpu else device.merge_partials
    return merge_there(near, far)


def slot_angles(sequence: Sequence, layer: int, rotary: Rotary) -> Angles:
    """Angles of the near rows [Hkv, N] by their rank among the positions kept."""
    near = sequence.near[layer]
    assert near.positions is not None
    order = near.positions[:, : near.length].argsort(-1)
    return rotary.angles(order.argsort(-1))
