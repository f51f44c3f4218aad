"""Facts about the machine, and the meaning of "auto" on it.

Cores, memory, SIMD and huge pages that this process may use (affinity and control groups
included), the device and the compute type. Every choice comes with its reason in words. This module
uses no model and no policy. Units are bytes and cores.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from llvmlite import binding

from nearfar.config import COMPUTE_DTYPES
from nearfar.errors import InvalidOptionError, UnknownNameError
from nearfar.runtime.memory import cgroups

TOPOLOGY = Path("/sys/devices/system/cpu")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# features that matter for attention and matrix products, by their LLVM names
SIMD_FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "amx_tile": "amx-tile",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
    "neon": "neon",
    "sve": "sve",
    "arm_bf16": "bf16",
}


def usable_cpus() -> set[int]:
    """Logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(psutil.cpu_count() or 1))


def physical_cores(topology: Path = TOPOLOGY) -> int:
    """Physical cores among the CPUs that this process may run on, at least 1."""
    cpus = usable_cpus()
    siblings = [topology / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in cpus]
    try:
        return len({path.read_text() for path in siblings})
    except OSError:  # not Linux, or /sys is hidden
        return max(1, min(psutil.cpu_count(logical=False) or len(cpus), len(cpus)))


def default_threads() -> int:
    """Host threads to use: one per physical core, fewer under a CPU quota, at least 1."""
    quota = cgroups.cpu_quota_cores()
    return physical_cores() if quota is None else max(1, min(physical_cores(), int(quota)))


def threads_reason() -> str:
    """The reason for the number of `default_threads`."""
    quota = cgroups.cpu_quota_cores()
    if quota is not None and max(1, int(quota)) < physical_cores():
        return f"the control group allows {quota:g} cores of CPU time"
    return "one per physical core that this process may use"


def total_memory_bytes() -> int:
    """Memory of the machine, or of the control group if that is less."""
    limit = cgroups.memory_limit_bytes()
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def available_memory_bytes() -> int:
    """Memory that can be allocated without swapping: the machine's or the control group's."""
    left = cgroups.memory_left_bytes()
    available = int(psutil.virtual_memory().available)
    return available if left is None else min(available, left)


def huge_page_mode(path: Path = HUGE_PAGES) -> str:
    """Transparent huge pages: always, madvise, never, or unknown outside Linux."""
    try:
        words = path.read_text().split()
    except OSError:
        return "unknown"
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


@lru_cache(maxsize=1)
def simd_features() -> frozenset[str]:
    """Names from SIMD_FEATURES that this CPU and its operating system support."""
    host = binding.get_host_cpu_features()
    return frozenset(name for name, llvm_name in SIMD_FEATURES.items() if host.get(llvm_name))


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device of near memory, and the reason. ``name`` is auto, cpu, cuda or cuda:N."""
    # lets memory cached in pieces of one size serve pieces of another, so that more fits under a
    # cap; torch reads it with the first tensor, and a value set by the user stays
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        if gpus:
            return torch.device("cuda:0"), f"a CUDA GPU is there: {torch.cuda.get_device_name(0)}"
        return torch.device("cpu"), f"no CUDA GPU is usable ({_why_no_gpu()})"
    device = torch.device(name)
    if device.type == "cuda":
        if not gpus:
            raise InvalidOptionError(
                f"Device {name!r} was asked for, but no CUDA GPU is usable: {_why_no_gpu()}. "
                "Use --device cpu, or install a driver and a torch built for CUDA."
            )
        if (device.index or 0) >= gpus:
            raise InvalidOptionError(
                f"Device {name!r} was asked for, but the CUDA GPUs here are cuda:0 to "
                f"cuda:{gpus - 1}. Use one of them."
            )
        device = torch.device("cuda", device.index or 0)
    return device, "asked for"


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch is built for CUDA {torch.version.cuda}, but finds no GPU or no driver"


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type of weights and activations, and the reason. ``name`` is auto or a dtype's name.

    On a CPU bfloat16 is fast only with its own instructions. Without them torch converts to float32
    and back, which is slower than float32 throughout.
    """
    if name not in COMPUTE_DTYPES:
        raise UnknownNameError("dtype", name, COMPUTE_DTYPES)
    if name != "auto":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return dtype[name], "asked for"
    if device.type == "cuda":
        return torch.bfloat16, "a CUDA GPU multiplies bfloat16 natively"
    native = sorted(simd_features() & {"avx512_bf16", "amx_bf16"})
    if native:
        return torch.bfloat16, f"this CPU multiplies bfloat16 natively ({', '.join(native)})"
    return torch.float32, "this CPU has neither avx512_bf16 nor amx_bf16"


def versions() -> dict[str, str]:
    """Versions of the packages that determine speed and results."""
    names = ("nearfar", "numba", "numpy", "transformers", "tokenizers")
    found = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that was never installed
            found[name] = "not installed"
    found["cuda"] = torch.version.cuda or "none"
    return found
