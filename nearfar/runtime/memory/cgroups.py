"""The limits of a Linux control group (a container, a batch job) on this process.

Reads both versions of the interface and every level from the process's group up to the root, since
each may set a limit. Needs neither psutil nor torch. Memory in bytes, CPU time in cores. On a
system without control groups nothing is limited.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 2**60  # version 1 writes "no limit" as a number near 2**63


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Folders that may limit ``controller``, the process's own group first, without repetition."""
    seen: set[Path] = set()
    for line in (_read(membership) or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # inside a container the path is often the host's, and the root is the process's own group
        for base in [root / controllers] if controllers else [root, root / "unified"]:
            own = base / group.lstrip("/")
            for folder in [own, *own.parents]:
                if not folder.is_relative_to(base):
                    break
                if folder not in seen and folder.is_dir():
                    seen.add(folder)
                    yield folder


def _number(path: Path) -> int | None:
    """The number in a file; None where it is absent, ``max`` or as good as unlimited."""
    text = _read(path)
    if text is None or not text.isdecimal() or int(text) >= UNLIMITED:
        return None
    return int(text)


def _inactive_file_bytes(folder: Path) -> int:
    """Page cache that the kernel would give back before it refuses memory."""
    stat = dict(line.split(" ", 1) for line in (_read(folder / "memory.stat") or "").splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))


def memory_limit_bytes(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """The tightest memory limit, or None."""
    files = ("memory.max", "memory.limit_in_bytes")
    folders = _folders("memory", root, membership)
    limits = [_number(folder / file) for folder in folders for file in files]
    return min((limit for limit in limits if limit is not None), default=None)


def memory_left_bytes(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes left under the tightest limit, or None; page cache counts as free."""
    left = []
    for folder in _folders("memory", root, membership):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and usage is not None:
                left.append(max(0, limit - usage + _inactive_file_bytes(folder)))
    return min(left, default=None)


def cpu_quota_cores(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Cores' worth of CPU time that may be used, or None."""
    quotas = []
    for folder in _folders("cpu", root, membership):
        quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        if not quota:
            quota = _read(folder / "cpu.cfs_quota_us") or ""
            period = _read(folder / "cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal():  # "max" and "-1" are no quota
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)
