from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from limits import Deadline, Helper, beside

from nearfar.cpu_kernels import serve
from nearfar.cpu_kernels.atomics import fetch_add, load_acquire, store_release
from nearfar.cpu_kernels.attend import attend_all, attend_selected
from nearfar.cpu_kernels.attend_tile import head_block
from nearfar.cpu_kernels.items import row_array
from nearfar.cpu_kernels.mailbox import FLAG_WORDS, FarRowLayout, Mailbox
from nearfar.records import FarView, Selection

SEGMENT = 64
LAYERS = 3
TURNS = 100_000  # some milliseconds


class Case:
    """A mailbox in plain memory with far rows and queries in it, and what must come back."""

    def __init__(
        self,
        lengths: list[int],
        heads: tuple[int, int, int],
        per_group: bool = True,
        everything: bool = False,
        parts: int = 2,
        threads: int = 1,
        micro_batches: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        Hq, Hkv, D = heads
        B, rng = len(lengths), np.random.default_rng(0)
        self.heads = Hq // Hkv if per_group else 1
        R = B * Hq // self.heads
        segments = max(1, -(-max(lengths) // SEGMENT))
        self.rows = torch.full(
            (micro_batches, LAYERS, B, Hkv, max(lengths) + 3, 2 * D), torch.nan
        ).to(dtype)
        for b, length in enumerate(lengths):
            known = torch.randn(micro_batches, LAYERS, Hkv, length, 2 * D)
            self.rows[:, :, b, :, :length] = known.to(dtype)
        items = row_array(self.rows)
        self.box = Mailbox(
            ready=np.zeros((micro_batches, FLAG_WORDS), np.int32),
            done=np.zeros((micro_batches, FLAG_WORDS), np.int32),
            host_queries=rng.standard_normal((micro_batches, B, Hq, D), np.float32) * D**-0.5,
            chosen=np.full((micro_batches, R, segments, SEGMENT), -1, np.int64),
            counts=np.full((micro_batches, R, segments, 2), 10**6, np.int32),
            out=np.full((micro_batches, R, parts, self.heads, D), np.nan, np.float32),
            lse=np.full((micro_batches, R, parts, self.heads), np.nan, np.float32),
            addresses=np.zeros((micro_batches, B, LAYERS), np.int64),
            head_strides=np.full((micro_batches, B), self.rows.stride(3), np.int64),
            lengths=np.tile(np.array(lengths, np.int64), (micro_batches, 1)),
            arrivals=np.zeros((micro_batches, FLAG_WORDS), np.int64),
            rows_read=np.zeros((threads, FLAG_WORDS), np.int64),
            stamps=np.zeros((micro_batches, LAYERS, 2), np.int64),
            control=np.zeros(FLAG_WORDS, np.int64),
        )
        for micro_batch in range(micro_batches):
            for layer in range(LAYERS):
                for b in range(B):
                    self.box.addresses[micro_batch, b, layer] = self.rows[
                        micro_batch, layer, b
                    ].data_ptr()
        sizes = (Hkv, np.empty((0, 2 * D), items.dtype), 1, LAYERS, micro_batches, threads)
        self.row_layout = FarRowLayout(head_block(self.heads), everything, *sizes)
        self.lengths, self.rng = lengths, rng
        # compiled before anyone waits for it: no step has begun, so nothing is served
        serve.serve_steps(self.box, self.row_layout, 0, 0, 0, 1)

    def choose(self, micro_batch: int) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Put a random selection into the mailbox, as a GPU would; indices, log-weights a row."""
        chosen = []
        R = self.box.lse.shape[1]
        for r in range(R):
            length = self.lengths[r * len(self.lengths) // R]
            picked = np.flatnonzero(self.rng.random(length) < 0.3).astype(np.int32)
            weights = self.rng.random(len(picked), np.float32)
            pairs = weights.view(np.int32).astype(np.int64) << 32 | picked
            for s in range(-(-length // SEGMENT)):
                part = pairs[(picked >= s * SEGMENT) & (picked < (s + 1) * SEGMENT)]
                self.box.chosen[micro_batch, r, s, : len(part)] = part
                self.box.counts[micro_batch, r, s] = len(part), 3
            chosen.append((picked, weights))
        return chosen

    def want(self, micro_batch: int, layer: int, chosen: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, Hq, D] and log-sum-exp [B, Hq] by the kernels that are tested elsewhere."""
        outs, totals = [], []
        per = self.box.lse.shape[1] // len(self.lengths)
        for b, length in enumerate(self.lengths):
            far = FarView(self.rows[micro_batch, layer, b].contiguous(), length)
            query = torch.from_numpy(self.box.host_queries[micro_batch, b])
            if self.row_layout.everything:
                partial = attend_all(query, far)
            else:
                mine = chosen[b * per : (b + 1) * per]
                offsets = np.cumsum([0] + [len(i) for i, _ in mine]).astype(np.int64)
                indices, weights = (np.concatenate(x) for x in zip(*mine, strict=True))
                partial = attend_selected(
                    query, far, Selection(indices, offsets, weights, self.heads)
                )
            outs.append(partial.out)
            totals.append(partial.lse)
        return torch.stack(outs), torch.stack(totals)

    def got(self, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the mailbox holds, its parts merged."""
        out, lse = (
            torch.from_numpy(self.box.out[micro_batch]),
            torch.from_numpy(self.box.lse[micro_batch]),
        )
        total = lse.logsumexp(1, keepdim=True)
        weight = torch.exp(lse - total.where(total.isfinite(), 0.0))
        merged = (out * weight[..., None]).sum(1)
        B, Hq, D = self.box.host_queries.shape[1:]
        return merged.view(B, Hq, D), total.view(B, Hq)

    def check(self, micro_batch: int, layer: int, chosen: Any) -> None:
        for got, want in zip(
            self.got(micro_batch), self.want(micro_batch, layer, chosen), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def play(case: Case, micro_batch: int) -> None:
    """The GPU's side of one step: ask, wait, look at the answer, layer by layer."""
    for layer in range(LAYERS):
        case.box.host_queries[micro_batch] = case.rng.standard_normal(
            case.box.host_queries.shape[1:], np.float32
        )
        chosen = None if case.row_layout.everything else case.choose(micro_batch)
        store_release(case.box.ready[micro_batch], 0, layer + 1)
        deadline = Deadline()
        while load_acquire(case.box.done[micro_batch], 0) <= layer:
            deadline.check("an answer")
            time.sleep(0)
        case.check(micro_batch, layer, chosen)


def serve_beside(case: Case, helpers: list[Helper]) -> None:
    """One step, on this thread, for GPUs that are played by ``helpers``."""
    layers, deadline = np.zeros(case.row_layout.micro_batches, np.int64), Deadline()
    while serve.serve_step(case.box, case.row_layout, 0, layers, TURNS) == serve.UNFINISHED:
        for helper in helpers:
            helper.check()
        deadline.check("the end of a step")
    assert (layers == LAYERS).all()


CASES = [
    {"lengths": [200], "heads": (4, 2, 32)},
    {"lengths": [150, 1, 0], "heads": (6, 2, 20)},
    {"lengths": [130, 77], "heads": (3, 1, 64), "per_group": False},
    {"lengths": [100, 3], "heads": (4, 4, 16), "everything": True, "parts": 3},
    {"lengths": [99], "heads": (2, 1, 40), "dtype": torch.float32},
    {"lengths": [70], "heads": (2, 1, 24), "dtype": torch.float16, "parts": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", CASES)
def test_one_thread_serves_a_step(settings: dict[str, Any]) -> None:
    case = Case(**settings)
    with beside(partial(play, case, 0)) as helpers:
        serve_beside(case, helpers)
    assert (case.box.stamps[0, :, 1] >= case.box.stamps[0, :, 0]).all()
    if not case.row_layout.everything:
        assert (
            0
            < case.box.rows_read[0, 0]
            < LAYERS * sum(case.lengths) * case.box.host_queries.shape[2]
        )


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_threads_serve_micro_batches_together_step_after_step(micro_batches: int) -> None:
    case = Case(
        lengths=[300, 40], heads=(4, 2, 16), threads=3, micro_batches=micro_batches, parts=3
    )
    workers = [
        Helper(partial(serve.serve_steps, case.box, case.row_layout, thread, 0, 10**6, 10**10))
        for thread in (1, 2)
    ]
    for _ in range(3):
        for flags in (case.box.ready, case.box.done, case.box.arrivals):
            flags[:] = 0
        fetch_add(case.box.control, serve.STEP, 1)
        with beside(
            *(partial(play, case, micro_batch) for micro_batch in range(micro_batches))
        ) as helpers:
            serve_beside(case, helpers + workers)
    store_release(case.box.control, serve.STOP, 1)
    for worker in workers:
        worker.finish()


def test_waiting_ends_with_patience_and_with_stop() -> None:
    case = Case(lengths=[10], heads=(2, 1, 16))
    layers = np.zeros(1, np.int64)
    assert serve.serve_step(case.box, case.row_layout, 0, layers, 50) == serve.UNFINISHED
    assert serve.serve_steps(case.box, case.row_layout, 0, 0, 2, 50) == 0
    fetch_add(case.box.control, serve.STEP, 1)
    assert serve.serve_steps(case.box, case.row_layout, 0, 0, 2, 50) == serve.ABANDONED
    store_release(case.box.control, serve.STOP, 1)
    assert serve.serve_step(case.box, case.row_layout, 0, layers, 10**10) == serve.UNFINISHED
    assert serve.serve_steps(case.box, case.row_layout, 0, 0, 2, 50) == 0
    assert not serve.await_layer(case.box, 0, 0, 5)
    store_release(case.box.ready[0], 0, 1)
    assert serve.await_layer(case.box, 0, 0, 5)
    serve.answer_layer(case.box, 0, 0)
    assert case.box.done[0, 0] == 1
    assert serve.await_answers(case.box, 1, 5)
    assert not serve.await_answers(case.box, 2, 5)


def test_calls_that_stop_coming_are_not_waited_for() -> None:
    ready, done = np.zeros((1, FLAG_WORDS), np.int32), np.zeros((1, 1), np.int32)
    store_release(ready[0], 0, 2)
    assert serve.echo(ready, done, 3, 50) == 2
    assert done[0, 0] == 2
    store_release(ready[0], 0, 3)
    assert serve.echo(ready, done, 3, 50) == 3


def test_the_interpreted_kernels_do_the_same() -> None:
    case = Case(lengths=[90], heads=(4, 2, 8), parts=2)
    chosen = case.choose(0)
    for r in range(2):
        for f in range(2):
            read, _ = serve.attend_part.py_func(case.box, case.row_layout, 0, 1, r, f)
            fetched = 3 * 2 if f == 0 else 0  # of the GPU, in two segments
            mine = len(chosen[r][0]) * (f + 1) // 2 - len(chosen[r][0]) * f // 2
            assert read == mine + fetched
            indices, _ = serve.slice_part.py_func(
                case.box.chosen[0, r], case.box.counts[0, r], 2, f, 2
            )
            assert len(indices) == mine
    case.check(0, 1, chosen)
    case.box.ready[0, 0] = 1
    layers = np.zeros(1, np.int64)
    serve.serve_step.py_func(case.box, case.row_layout, 0, layers, 3)
    assert layers[0] == 1
    assert case.box.done[0, 0] == 1


def test_the_clock_is_the_monotonic_one() -> None:
    before = time.monotonic_ns()
    now = serve.nanoseconds()
    assert before <= now <= time.monotonic_ns()
