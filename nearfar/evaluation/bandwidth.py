"""The best measured rates of this machine, from which ceilings are computed.

Every rate is the best of a few runs over data much larger than the caches. Bytes or floating-point
operations a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nearfar.cpu_kernels import serve
from nearfar.cpu_kernels.atomics import store_release
from nearfar.cpu_kernels.mailbox import FLAG_WORDS
from nearfar.errors import DeviceError
from nearfar.runtime.memory.host_memory import reserve
from nearfar.runtime.steps.gpu.stream_flags import wait_for_flag, write_flag

SEQUENTIAL_BYTES = 2**29
GATHER_BYTES = 2**28
GATHER_ROWS = 2**16
HANDOFFS = 64
PATIENCE_TURNS = 200_000_000  # some 10 s
RUNS = 5


def sequential_bytes_per_second(device: torch.device, num_bytes: int = SEQUENTIAL_BYTES) -> float:
    """Reading memory in order: a sum over float32."""
    data = torch.ones(num_bytes // 4, device=device)
    return num_bytes / _best_seconds(lambda: data.sum(), device)


def gather_bytes_per_second(row_bytes: int, num_bytes: int = GATHER_BYTES) -> float:
    """Reading rows of ``row_bytes`` (a multiple of 4) at random from host memory.

    `torch.index_select` does it, on huge pages where the system gives them, as far memory has.
    """
    memory = torch.from_numpy(reserve(max(1, num_bytes // row_bytes) * row_bytes))
    rows = memory.view(torch.float32).view(-1, row_bytes // 4).fill_(1)
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(rows), (min(GATHER_ROWS, len(rows)),), generator=generator)
    out = torch.empty(len(picked), rows.shape[1])
    seconds = _best_seconds(
        lambda: torch.index_select(rows, 0, picked, out=out), torch.device("cpu")
    )
    return len(picked) * row_bytes / seconds


def link_bytes_per_second(device: torch.device, num_bytes: int = GATHER_BYTES) -> float:
    """Copying pinned host memory to a GPU, in order."""
    here = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes / _best_seconds(lambda: there.copy_(here, non_blocking=True), device)


def handoff_seconds(device: torch.device, handoffs: int = HANDOFFS) -> float:
    """Time of one round trip, of many, from a GPU to a host thread that answers at once.

    Flags in pinned memory, written and waited for by the stream, within one CUDA graph.
    """
    flags = torch.zeros(2, 1, FLAG_WORDS, dtype=torch.int32, pin_memory=True)
    ready, done = flags[0].numpy(), flags[1].numpy()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(1, handoffs + 1):
            write_flag(stream, flags[0].data_ptr(), number)
            wait_for_flag(stream, flags[1].data_ptr(), number)

    def once() -> torch.Tensor:
        flags.zero_()
        graph.replay()
        came = serve.echo(ready, done, handoffs, PATIENCE_TURNS)
        if came < handoffs:
            store_release(done[0], 0, handoffs)  # end the waits that are left
            raise DeviceError(
                f"The GPU called the host {came} times of {handoffs} and then stopped. "
                "Look at nvidia-smi and the kernel's log."
            )
        return flags

    return _best_seconds(once, device) / handoffs


def matmul_flops_per_second(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> float:
    """Multiplying [m, k] by [k, n], ``shape`` being (m, k, n)."""
    m, k, n = shape
    # random: ones leave most of a multiplier still, and let a GPU run faster than it does at work
    left = torch.randn(m, k, dtype=dtype, device=device)
    right = torch.randn(n, k, dtype=dtype, device=device)
    return 2.0 * m * k * n / _best_seconds(lambda: left @ right.T, device)


def synchronise(device: torch.device) -> None:
    """Wait until ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    work()
    best = float("inf")
    for _ in range(RUNS):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best
