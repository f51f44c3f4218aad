from __future__ import annotations

import re
import subprocess
import sys

import psutil
import pytest
import torch
from limits import LIMIT_SECONDS

from nearfar.errors import DeviceError, OutOfMemoryError
from nearfar.runtime.engine.accounting import memory_errors, peak_gpu_bytes, peak_rss_bytes

HOST = (
    "Host memory ran out. Give a shorter text, or choose a smaller model, --dtype or --far-dtype."
)
PEAK = """
from nearfar.runtime.engine.accounting import peak_rss_bytes
print(peak_rss_bytes())
"""


def test_peak_holds_what_was_touched_and_is_gone() -> None:
    before = psutil.Process().memory_info().rss
    ballast = torch.ones(2**25)
    most = before + ballast.nbytes
    del ballast
    assert peak_rss_bytes() > 0.95 * most
    assert peak_rss_bytes() < 4 * most


@pytest.mark.slow
def test_peak_is_of_this_process_and_not_of_its_parent() -> None:
    ballast = torch.ones(2**27)
    peak = int(
        subprocess.run(
            [sys.executable, "-c", PEAK], capture_output=True, check=True, timeout=LIMIT_SECONDS
        ).stdout
    )
    assert 50 * 2**20 < peak < ballast.nbytes


def test_cpu_has_no_gpu_peak() -> None:
    assert peak_gpu_bytes(torch.device("cpu")) == 0


def test_failed_allocation_of_torch_is_put_into_words() -> None:
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(HOST)}$"), memory_errors():
        torch.zeros(2**55)


def test_failed_allocation_of_python_is_put_into_words() -> None:
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(HOST)}$"), memory_errors():
        bytearray(2**60)


def test_full_gpu_is_put_into_words() -> None:
    message = (
        "GPU memory ran out: CUDA out of memory. Tried to allocate 2 GiB. Raise --near-memory, "
        "give a shorter text, or choose a smaller model or --dtype."
    )
    said = "CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation."
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(message)}$"), memory_errors():
        raise torch.cuda.OutOfMemoryError(said)


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("another"), KeyError(1)])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_errors():
        raise error
    assert caught.value is error


def test_long_advice_of_an_allocator_is_left_out() -> None:
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB of which 1 GiB is free. "
        "Including other memory 24 GiB is in use. See documentation"
    )
    message = (
        "GPU memory ran out: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB of "
        "which 1 GiB is free. Raise --near-memory, give a shorter text, or choose a smaller model "
        "or --dtype."
    )
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(message)}$"), memory_errors():
        raise torch.cuda.OutOfMemoryError(said)


def test_a_failed_gpu_is_put_into_words() -> None:
    message = (
        "The GPU failed: CUDA error: an illegal memory access was encountered. What it held is "
        "lost. Start again; if it fails again, look at nvidia-smi and the kernel's log, or use "
        "--device cpu."
    )
    said = "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"
    with pytest.raises(DeviceError, match=f"^{re.escape(message)}$"), memory_errors():
        raise torch.AcceleratorError(said)


def test_pinned_memory_that_is_not_to_be_had() -> None:
    message = (
        "Pinned host memory ran out. Give a shorter text, or allow more locked memory (ulimit -l)."
    )
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(message)}$"), memory_errors():
        raise torch.AcceleratorError("CUDA error: out of memory\nmore")
