from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from nearfar.errors import InvalidOptionError, UnknownNameError
from nearfar.runtime.memory import cgroups, hardware

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")


def test_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, siblings in enumerate(["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(hardware, "usable_cpus", lambda: {0, 1, 4})
    assert hardware.physical_cores(tmp_path) == 2


def test_cores_without_a_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "usable_cpus", lambda: {0, 1, 2})
    for counted, expected in ((8, 3), (2, 2), (None, 3)):
        monkeypatch.setattr(psutil, "cpu_count", lambda n=counted, **_: n)
        assert hardware.physical_cores(tmp_path) == expected


@pytest.mark.parametrize(
    ("quota", "threads", "reason"),
    [
        (None, 4, "one per physical core"),
        (8.0, 4, "one per physical core"),
        (2.5, 2, "the control group allows 2.5 cores"),
        (0.5, 1, "the control group allows 0.5 cores"),
    ],
)
def test_threads_respect_a_quota(
    quota: float | None, threads: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "physical_cores", lambda: 4)
    monkeypatch.setattr(cgroups, "cpu_quota_cores", lambda: quota)
    assert hardware.default_threads() == threads
    assert reason in hardware.threads_reason()


def test_memory_is_the_machines_or_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    for left, limit in ((None, None), (2**60, 2**60)):
        monkeypatch.setattr(cgroups, "memory_left_bytes", lambda left=left: left)
        monkeypatch.setattr(cgroups, "memory_limit_bytes", lambda limit=limit: limit)
        assert hardware.available_memory_bytes() == machine.available
        assert hardware.total_memory_bytes() == machine.total
    monkeypatch.setattr(cgroups, "memory_left_bytes", lambda: 1000)
    monkeypatch.setattr(cgroups, "memory_limit_bytes", lambda: 2000)
    assert hardware.available_memory_bytes() == 1000
    assert hardware.total_memory_bytes() == 2000


def test_huge_pages(tmp_path: Path) -> None:
    path = tmp_path / "enabled"
    assert hardware.huge_page_mode(path) == "unknown"
    path.write_text("always [madvise] never\n")
    assert hardware.huge_page_mode(path) == "madvise"


def test_simd_features_are_known_names() -> None:
    assert hardware.simd_features() <= set(hardware.SIMD_FEATURES)


@pytest.mark.usefixtures("no_gpu")
def test_device_without_a_gpu() -> None:
    device, reason = hardware.choose_device("auto")
    assert device == CPU
    assert reason == (f"no CUDA GPU is usable (torch {torch.__version__} is built without CUDA)")
    assert hardware.choose_device("cpu") == (CPU, "asked for")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(name: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        hardware.choose_device(name)
    assert str(caught.value) == (
        f"Device {name!r} was asked for, but no CUDA GPU is usable: torch {torch.__version__} is "
        "built without CUDA. Use --device cpu, or install a driver and a torch built for CUDA."
    )


def test_a_torch_for_cuda_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "torch is built for CUDA 13.0, but finds no GPU" in hardware.choose_device("auto")[1]


@pytest.mark.usefixtures("two_gpus")
def test_device_with_gpus() -> None:
    device, reason = hardware.choose_device("auto")
    assert device == torch.device("cuda:0")
    assert reason == "a CUDA GPU is there: GPU 0"
    assert hardware.choose_device("cuda")[0] == torch.device("cuda:0")
    assert hardware.choose_device("cuda:1")[0] == torch.device("cuda:1")
    assert hardware.choose_device("cpu")[0] == CPU
    with pytest.raises(InvalidOptionError, match="the CUDA GPUs here are cuda:0 to cuda:1"):
        hardware.choose_device("cuda:2")


@pytest.mark.parametrize(
    ("features", "dtype", "reason"),
    [
        ({"avx512_bf16", "avx2"}, torch.bfloat16, "natively (avx512_bf16)"),
        ({"amx_bf16"}, torch.bfloat16, "natively (amx_bf16)"),
        ({"avx2", "avx512f"}, torch.float32, "neither avx512_bf16 nor amx_bf16"),
    ],
)
def test_dtype_on_a_cpu(
    features: set[str], dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "simd_features", lambda: frozenset(features))
    chosen, why = hardware.choose_dtype("auto", CPU)
    assert chosen == dtype
    assert reason in why


def test_dtype_on_a_gpu_or_by_name() -> None:
    assert hardware.choose_dtype("auto", torch.device("cuda"))[0] == torch.bfloat16
    assert hardware.choose_dtype("float16", CPU) == (torch.float16, "asked for")
    with pytest.raises(UnknownNameError, match="Did you mean 'float32'"):
        hardware.choose_dtype("float3", CPU)


def test_versions() -> None:
    found = hardware.versions()
    assert found["torch"] == torch.__version__
    assert found["python"].startswith("3.")
