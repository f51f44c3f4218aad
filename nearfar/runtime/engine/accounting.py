"""Memory of this process: its peaks, and error messages for failed allocations."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nearfar.errors import DeviceError, OutOfMemoryError

_STATUS = Path("/proc/self/status")  # Linux


def peak_rss_bytes() -> int:
    """The most resident memory that this process has ever had."""
    if _STATUS.exists():
        # getrusage also counts the memory before exec, which was the parent's
        (peak_kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return int(peak_kib) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes(device: torch.device) -> int:
    """The most memory that the allocator has ever reserved on ``device``; 0 without a GPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def _first_sentences(error: Exception) -> str:
    """The sentences of an allocator's message about sizes, without its advice."""
    return ". ".join(str(error).splitlines()[0].split(". ")[:3]).rstrip(".") + "."


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a failed allocation into an OutOfMemoryError, a failed GPU into a DeviceError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"GPU memory ran out: {_first_sentences(error)} Raise --near-memory, give a shorter "
            "text, or choose a smaller model or --dtype."
        ) from error
    except torch.AcceleratorError as error:
        if "out of memory" in str(error):  # pinned memory, not the GPU's
            raise OutOfMemoryError(
                "Pinned host memory ran out. Give a shorter text, or allow more locked memory "
                "(ulimit -l)."
            ) from error
        raise DeviceError(
            f"The GPU failed: {str(error).splitlines()[0]}. What it held is lost. Start again; if "
            "it fails again, look at nvidia-smi and the kernel's log, or use --device cpu."
        ) from error
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for a CPU allocation that fails
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(
            "Host memory ran out. Give a shorter text, or choose a smaller model, --dtype or "
            "--far-dtype."
        ) from error
