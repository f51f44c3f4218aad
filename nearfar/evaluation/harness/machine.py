"""The machine in words, beside every time that was measured on it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")  # Linux


def machine_name(device: torch.device, threads: int) -> str:
    """The GPU, if near is one, and the host's processor and threads."""
    found = None
    if _CPU_INFO.exists():
        found = re.search(r"^model name\s*: (.+)$", _CPU_INFO.read_text(), re.MULTILINE)
    host = found[1] if found else platform.processor() or platform.machine()
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{gpu}{threads} threads of {' '.join(host.split())}"
