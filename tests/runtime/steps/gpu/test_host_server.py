"""What happens between the two processors, a thread playing the GPU.

The whole replay of a step runs: flags, threads, waits. Only what a CUDA graph would launch is a
thread that raises `ready` layer by layer and waits for `done`, as a stream does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import LIMIT_SECONDS, Deadline
from tiny_engine import read, tiny_config, tiny_engine, tokens

from nearfar.cpu_kernels.atomics import load_acquire, store_release
from nearfar.errors import DeviceError
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.steps.gpu import host_server as servers
from nearfar.runtime.steps.gpu.exchange import ExchangeShape, PinnedExchange, row_layout_of
from nearfar.runtime.steps.gpu.host_server import PooledServer, SelectingServer
from nearfar.runtime.steps.gpu.micro_batches import MicroBatches, MicroBatchesKey

LAYERS = 4


class PretendGpu:
    """A graph and a stream in one: `replay` starts a thread, `synchronize` waits for it."""

    def __init__(
        self, micro_batches: MicroBatches, at_layer: Callable[[int], object] = lambda _: None
    ) -> None:
        assert micro_batches._server is not None
        self.box = micro_batches._server.memory.box
        self.at_layer = at_layer
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def replay(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def synchronize(self) -> None:
        assert self.thread is not None
        self.thread.join(LIMIT_SECONDS)
        assert not self.thread.is_alive(), "the GPU still waits for the host"
        self.query()

    def wait_stream(self, _: Any) -> None:
        return None

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return True

    def _run(self) -> None:
        try:
            for layer in range(LAYERS):
                self.at_layer(layer)
                store_release(self.box.ready[0], 0, layer + 1)
                deadline = Deadline()
                while load_acquire(self.box.done[0], 0) <= layer:
                    deadline.check("an answer")
                    time.sleep(0)
        except BaseException as error:
            self.error = error


def set_up(
    policy: str, monkeypatch: pytest.MonkeyPatch, at_layer: Callable[[int], object] = lambda _: None
) -> tuple[MicroBatches, Sequence, PretendGpu]:
    """Micro-batches that believe in a GPU, and the one that they get."""
    engine: Engine = tiny_engine(tiny_config(layers=LAYERS), policy=policy, device="cpu")
    sequence = read(engine, tokens(60).cpu())
    for near in sequence.near:
        near.reserve(near.length + 1)
    micro_batches = MicroBatches(engine.decoder, MicroBatchesKey(1, 1, 4096), [sequence], 1)
    gpu = PretendGpu(micro_batches, at_layer)
    micro_batches._graphs, micro_batches._on_gpu = [gpu], True  # type: ignore[list-item]
    micro_batches._streams[:] = [gpu]  # type: ignore[list-item]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: _Nothing())
    return micro_batches, sequence, gpu


def hold_at(layer: int, held: threading.Event) -> Callable[[int], None]:
    """Makes the GPU stop before a layer until ``held`` is set."""

    def at_layer(now: int) -> None:
        if now == layer:
            assert held.wait(LIMIT_SECONDS)

    return at_layer


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


@pytest.mark.parametrize("policy", ["full-far", "topk-oracle"])
def test_a_step_is_served_layer_by_layer(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    micro_batches, sequence, _ = set_up(policy, monkeypatch)
    assert isinstance(
        micro_batches._server, PooledServer if policy == "full-far" else SelectingServer
    )
    for step in range(3):
        micro_batches.step([sequence], [step])
    assert sequence.near[0].length == 8 + 3
    assert sequence.far.rows_read == 3 * LAYERS * 2 * 52
    micro_batches.close()


@pytest.mark.parametrize("policy", ["full-far", "topk-oracle"])
def test_ctrl_c_between_the_processors_lets_the_gpu_go(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    micro_batches, sequence, gpu = set_up(policy, monkeypatch, hold_at(2, held))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    assert micro_batches._server is not None
    monkeypatch.setattr(servers, "PATIENCE_TURNS", 1000)
    before = sequence.near[0].length
    looks = iter(range(1000))
    # the interpreter looks around now and then: the third time, someone has pressed Ctrl-C
    monkeypatch.setattr(
        micro_batches._server, "_check", lambda **_: interrupt() if next(looks) > 3 else None
    )
    with pytest.raises(KeyboardInterrupt):
        micro_batches.step([sequence], [1])
    held.set()
    gpu.synchronize()  # it was released: it runs to its end and waits for nobody
    assert sequence.near[0].length == before
    micro_batches.close()


@pytest.mark.parametrize("policy", ["full-far", "topk-oracle"])
def test_a_gpu_that_fails_ends_the_step(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(layer: int) -> None:
        if layer == 2:
            raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr(servers, "PATIENCE_TURNS", 1000)
    micro_batches, sequence, _ = set_up(policy, monkeypatch, fail)
    with pytest.raises(RuntimeError, match="device lost"):
        micro_batches.step([sequence], [1])
    micro_batches.close()


@pytest.mark.parametrize("policy", ["full-far", "topk-oracle"])
def test_a_gpu_that_falls_silent_is_given_up(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(servers, "PATIENCE_TURNS", 1000)
    monkeypatch.setattr(servers, "SILENCE_SECONDS", 0.2)
    micro_batches, sequence, gpu = set_up(policy, monkeypatch, hold_at(1, held))
    with pytest.raises(DeviceError) as caught:
        micro_batches.step([sequence], [1])
    assert str(caught.value) == (
        "The GPU sent the host no request in 0 s of a decode step. Look at nvidia-smi and the "
        "kernel's log; restart, or use --device cpu."
    )
    held.set()
    gpu.synchronize()
    micro_batches.close()


def pooled_server(threads: int) -> PooledServer:
    """Of one sequence with 52 far tokens; nobody asks it for anything yet."""
    engine: Engine = tiny_engine(tiny_config(layers=LAYERS), policy="full-far", device="cpu")
    sequence = read(engine, tokens(60).cpu())
    geometry = sequence.settings.geometry
    shape = ExchangeShape(1, 1, 2, ExchangeShape.parts_for(2, threads), 0, 1, threads)
    memory = PinnedExchange(geometry, shape, torch.device("cpu"))
    memory.bind(0, [sequence.far.store])
    row_layout = row_layout_of(geometry, sequence.far.store, shape, everything=True)
    server = PooledServer(memory, row_layout, lambda: None)
    server.kept = sequence  # type: ignore[attr-defined]  # addresses alone do not keep its rows
    return server


def test_threads_sleep_when_idle_and_wake_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "IDLE_NAPS", 5)
    server = pooled_server(threads=3)
    memory = server.memory
    for _ in range(3):
        time.sleep(0.05)  # long enough that every thread sleeps
        server.begin()
        for layer in range(LAYERS):
            store_release(memory.box.ready[0], 0, layer + 1)
        server.serve()
        assert memory.box.done[0, 0] == LAYERS  # the other threads' shares are done too
        assert server.pop_rows_read() == (LAYERS * 2 * 52, 0)
    server.close()
    assert not any(thread.is_alive() for thread in server._threads)


def test_a_thread_that_fails_fails_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no such processor")

    monkeypatch.setattr(servers, "PATIENCE_TURNS", 1000)
    monkeypatch.setattr(servers, "usable_cpus", lambda: [0, 1, 2])
    monkeypatch.setattr("os.sched_setaffinity", fail)
    server = pooled_server(threads=2)
    server.begin()
    for layer in range(LAYERS):
        store_release(server.memory.box.ready[0], 0, layer + 1)
    with pytest.raises(DeviceError) as caught:
        server.serve()
    assert str(caught.value) == (
        "A host thread that reads far keys has ended: no such processor. Load the model again."
    )
    server.close()


def test_a_thread_gives_up_a_step_that_was_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PATIENCE_TURNS", 1000)
    monkeypatch.setattr(servers, "STEP_TURNS", 1000)
    server = pooled_server(threads=2)
    server.begin()  # and nothing is asked
    server._threads[0].join(LIMIT_SECONDS)
    with pytest.raises(DeviceError, match="a step began and no request followed"):
        server.serve()
    server.close()


def test_threads_that_do_not_finish_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PATIENCE_TURNS", 1000)
    monkeypatch.setattr(servers, "CLOSING_SECONDS", 0.2)
    held, server = threading.Event(), pooled_server(threads=1)
    late = threading.Thread(target=held.wait, args=(LIMIT_SECONDS,), daemon=True)
    late.start()
    server._threads.append(late)
    server._reading = server._reading._replace(threads=2)  # one of them is late
    server.begin()
    for layer in range(LAYERS):
        store_release(server.memory.box.ready[0], 0, layer + 1)
    with pytest.raises(DeviceError, match=r"^Host threads did not finish a layer in 0 s\. Look"):
        server.serve()
    with pytest.raises(DeviceError, match=r"^Host threads were still reading far keys 0 s after"):
        server.close()
    held.set()
