"""Host attention for a GPU: threads that wait for its requests and answer layer by layer.

A GPU runs a whole decode step on its own. In every layer it writes queries, and where it selects
keys itself their list, into pinned memory, then the number of the layer into `ready`. The threads
here see the number and attend to their shares of the far rows. The last one to finish writes the
number into `done`, which the GPU waits for. The Python interpreter is not involved. Meanwhile the
GPU fetches some of its selected keys itself; they are not in the list.

Work of a layer is cut into tasks: one row of the selection (a KV group or a query head of one
sequence) times one part of its keys, and thread t does tasks t, t + threads, ... Parts are not
merged here: the GPU merges all of them with its own.

Several micro-batches, each with its mailbox (pinned exchange buffer), may be served in one step, in
any order.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nearfar.cpu_kernels.atomics import fetch_add, load_acquire, nap, relax, store_release
from nearfar.cpu_kernels.attend import attend_range
from nearfar.cpu_kernels.compile import serial

STEP, STOP = 0, 1  # words of `control`: number of steps begun; not 0: leave at once
SERVED, UNFINISHED = 0, 1  # results of `serve_step`
ABANDONED = -1  # of `serve_steps`: a step that began and did not go on
SPINS = 20_000  # turns of waiting for a step before a thread naps, about a millisecond
NAP_MICROSECONDS = 50


_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.voidptr))
_MONOTONIC = 1


@intrinsic
def _pointer(typing_context, address, like):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def _data(typing_context, array):
    def generate(context, builder, signature, arguments):
        made = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
        return builder.bitcast(made.data, context.get_value_type(types.voidptr))

    return types.voidptr(array), generate


@serial
def nanoseconds():
    """The monotonic clock of `time.monotonic_ns`."""
    parts = np.empty(2, np.int64)
    _clock(np.int32(_MONOTONIC), _data(parts))
    return parts[0] * 1_000_000_000 + parts[1]


@serial
def rows_at(address, count, width, like):
    """Rows [count, width] of the type of ``like`` at an address; nothing keeps them alive."""
    return numba.carray(_pointer(np.int64(address), like), (count, width))


@serial
def slice_part(chosen, counts, segments, part, parts):
    """Indices and log-weights of part ``part`` of ``parts`` of a row's chosen keys."""
    total = np.int64(0)
    for s in range(segments):
        total += counts[s, 0]
    start = total * part // parts
    stop = total * (part + 1) // parts
    indices = np.empty(stop - start, np.int32)
    log_weights = np.empty(stop - start, np.float32)
    weight_bits = log_weights.view(np.int32)
    before = np.int64(0)
    taken = 0
    for s in range(segments):
        count = np.int64(counts[s, 0])
        for i in range(max(start - before, 0), min(stop - before, count)):
            pair = chosen[s, i]
            indices[taken] = np.int32(pair & 0xFFFFFFFF)
            weight_bits[taken] = np.int32(pair >> 32)
            taken += 1
        before += count
    return indices, log_weights


@serial
def attend_part(box, row_layout, micro_batch, layer, r, f):
    """Attention of one row over one part of its keys, into the mailbox.

    Returns the number of keys and of the groups that they are in. The first part also counts the
    keys that the GPU fetches.
    """
    R, F, heads = box.lse.shape[1:]
    D = box.host_queries.shape[3]
    rows_of_sequence = R // box.lengths.shape[1]
    b = r // rows_of_sequence
    first_head = (r % rows_of_sequence) * heads
    kv_head = first_head * row_layout.kv_heads // box.host_queries.shape[2]
    length = box.lengths[micro_batch, b]
    address = box.addresses[micro_batch, b, layer]
    address += kv_head * box.head_strides[micro_batch, b] * row_layout.rows.itemsize
    rows = rows_at(address, length, row_layout.rows.shape[1], row_layout.rows)
    read = np.int64(0)
    if row_layout.everything:
        indices, log_weights = np.empty(0, np.int32), np.empty(0, np.float32)
        start, stop = length * f // F, length * (f + 1) // F
    else:
        size = box.chosen.shape[3]
        segments = (length + size - 1) // size
        indices, log_weights = slice_part(
            box.chosen[micro_batch, r], box.counts[micro_batch, r], segments, f, F
        )
        start, stop = 0, indices.shape[0]
        for s in range(segments if f == 0 else 0):
            read += np.int64(box.counts[micro_batch, r, s, 1])
    out, lse = box.out[micro_batch, r, f], box.lse[micro_batch, r, f]
    top, total = np.empty(heads, np.float32), np.empty(heads, np.float32)
    if stop > start:
        query = box.host_queries[micro_batch, b, first_head : first_head + heads]
        keys = (indices, log_weights, start, stop)
        attend_range(row_layout.block, rows, query, *keys, out, top, total)
    for g in range(heads):
        if stop <= start or total[g] <= 0:
            out[g, :] = 0.0
            lse[g] = -np.inf
            continue
        share = np.float32(1) / total[g]
        for d in range(D):
            out[g, d] *= share
        lse[g] = top[g] + np.log(total[g])
    groups = np.int64(0)
    if row_layout.group_tokens > 1:
        groups = count_groups(indices, start, stop, row_layout.group_tokens)
    return read + stop - start, groups


@serial
def count_groups(indices, start, stop, tokens):
    """How often consecutive keys are in different groups of ``tokens`` tokens."""
    groups, last = np.int64(0), np.int64(-1)
    for i in range(start, stop):
        group = (np.int64(indices[i]) if indices.shape[0] > 0 else i) // tokens
        groups += group != last
        last = group
    return groups


@serial
def serve_layer(box, row_layout, micro_batch, layer, thread):
    """Do the tasks of ``thread`` in one layer; the last thread to finish answers the GPU."""
    R, F = box.lse.shape[1], box.lse.shape[2]
    if thread == 0:
        box.stamps[micro_batch, layer, 0] = nanoseconds()
    for task in range(thread, R * F, row_layout.threads):
        read, groups = attend_part(box, row_layout, micro_batch, layer, task // F, task % F)
        box.rows_read[thread, 0] += read
        box.rows_read[thread, 1] += groups
    arrived = fetch_add(box.arrivals[micro_batch], 0, 1) + 1
    if arrived == row_layout.threads * (layer + 1):
        box.stamps[micro_batch, layer, 1] = nanoseconds()
        store_release(box.done[micro_batch], 0, layer + 1)


@serial
def serve_step(box, row_layout, thread, next_layers, patience):
    """Serve all micro-batches until each has had all its layers.

    ``next_layers`` [L] int64 is the next layer of each micro-batch, and is updated. After
    ``patience`` turns without a request, at least one, it returns UNFINISHED; call again to go on.
    """
    turns = 0
    while True:
        left = 0
        for micro_batch in range(row_layout.micro_batches):
            layer = next_layers[micro_batch]
            if layer == row_layout.layers:
                continue
            left += 1
            if load_acquire(box.ready[micro_batch], 0) > layer:
                serve_layer(box, row_layout, micro_batch, layer, thread)
                next_layers[micro_batch] = layer + 1
                turns = 0
        if left == 0:
            return SERVED
        turns += 1
        if load_acquire(box.control, STOP) != 0 or turns >= patience:
            return UNFINISHED
        relax()


@serial
def serve_steps(box, row_layout, thread, seen, patience, step_patience):
    """Serve step after step, from the one after ``seen`` on; returns the last served one's number.

    Returns when STOP is set, or after ``patience`` naps without a step. A step without a request
    for ``step_patience`` turns ends in ABANDONED.
    """
    next_layers = np.empty(row_layout.micro_batches, np.int64)
    naps = 0
    turns = 0
    while load_acquire(box.control, STOP) == 0:
        if load_acquire(box.control, STEP) == seen:
            turns += 1
            if turns < SPINS:
                relax()
            elif naps < patience:
                nap(np.uint32(NAP_MICROSECONDS))
                naps += 1
            else:
                break
            continue
        next_layers[:] = 0
        if serve_step(box, row_layout, thread, next_layers, step_patience) == UNFINISHED:
            return seen if load_acquire(box.control, STOP) != 0 else ABANDONED
        seen += 1
        turns = 0
        naps = 0
    return seen


@serial
def await_layer(box, micro_batch, layer, patience):
    """Whether the GPU requested ``layer`` of ``micro_batch`` within ``patience`` turns."""
    for _ in range(patience):
        if load_acquire(box.ready[micro_batch], 0) > layer:
            return True
        relax()
    return False


@serial
def await_answers(box, layers, patience):
    """Whether ``layers`` layers of every micro-batch were answered within ``patience`` turns."""
    for _ in range(patience):
        left = 0
        for micro_batch in range(box.done.shape[0]):
            left += load_acquire(box.done[micro_batch], 0) < layers
        if left == 0:
            return True
        relax()
    return False


@serial
def answer_layer(box, micro_batch, layer):
    """Publish the content of the mailbox to the GPU as the answer to ``layer``."""
    store_release(box.done[micro_batch], 0, layer + 1)


@serial
def echo(ready, done, calls, patience):
    """Answer ``calls`` requests on one thread and do nothing else; returns how many came.

    Stops at the first request that does not come within ``patience`` turns.
    """
    for call in range(1, calls + 1):
        turns = 0
        while load_acquire(ready[0], 0) < call:
            turns += 1
            if turns > patience:
                return call - 1
            relax()
        store_release(done[0], 0, call)
    return calls
