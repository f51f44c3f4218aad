from __future__ import annotations

from pathlib import Path

import pytest

from nearfar.runtime.memory import cgroups

UNLIMITED_V1 = "9223372036854771712"


def group(root: Path, path: str, **files: str) -> Path:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")
    return folder


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    path = tmp_path / "membership"
    path.write_text("0::/job/step\n")
    return path


def test_version_2_takes_the_tightest_level(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "cgroup"
    stat = "anon 5\ninactive_file 100"
    group(root, "job/step", memory__max="max", memory__current="700", cpu__max="max 100000")
    group(
        root,
        "job",
        memory__max="1000",
        memory__current="900",
        memory__stat=stat,
        cpu__max="150000 100000",
    )
    assert cgroups.memory_limit_bytes(root, membership) == 1000
    assert cgroups.memory_left_bytes(root, membership) == 1000 - 900 + 100
    assert cgroups.cpu_quota_cores(root, membership) == 1.5


def test_version_1(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n")
    group(
        root / "memory",
        "job",
        memory__limit_in_bytes="5000",
        memory__usage_in_bytes="4000",
        memory__stat="total_inactive_file 10",
    )
    group(root, "memory", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes="9")
    group(root, "cpu,cpuacct/job", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    assert cgroups.memory_limit_bytes(root, membership) == 5000
    assert cgroups.memory_left_bytes(root, membership) == 1010
    assert cgroups.cpu_quota_cores(root, membership) == 0.5


def test_in_a_container_the_root_is_the_own_group(tmp_path: Path, membership: Path) -> None:
    root = group(tmp_path, "cgroup", memory__max="800", memory__current="900")
    assert cgroups.memory_limit_bytes(root, membership) == 800
    assert cgroups.memory_left_bytes(root, membership) == 0


def test_nothing_is_limited(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "cgroup"
    group(
        root,
        "job/step",
        memory__max="max",
        memory__current="5",
        cpu__cfs_quota_us="-1",
        cpu__cfs_period_us="100000",
    )
    for where in (root, tmp_path / "gone"):
        assert cgroups.memory_limit_bytes(where, membership) is None
        assert cgroups.memory_left_bytes(where, membership) is None
        assert cgroups.cpu_quota_cores(where, membership) is None
    assert cgroups.memory_limit_bytes(root, tmp_path / "gone") is None
