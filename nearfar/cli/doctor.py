"""`nearfar doctor`: the machine, the settings that nearfar would use on it, and the reasons."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from nearfar.cli.options import debug_option, json_option
from nearfar.cli.output import Output, facts_table
from nearfar.config import cache_root, format_bytes


@click.command()
@json_option
@debug_option
def doctor(as_json: bool) -> None:
    """Show the machine as nearfar sees it: device, cores, SIMD, memory, caches, versions."""
    with Output(as_json) as output:
        machine, choices = _machine(), _choices()
        caches = {name: _folder(path) for name, path in _cache_folders().items()}
        versions = _versions()
        output.record({"machine": machine, "choices": choices})
        output.record({"caches": caches, "versions": versions})
        output.show(facts_table(_machine_facts(machine), "Machine"))
        used = {name: f"{choice['value']}: {choice['reason']}" for name, choice in choices.items()}
        output.show(facts_table(used, "\nWhat would be used"))
        folders = {name: _folder_text(folder) for name, folder in caches.items()}
        output.show(facts_table(folders, "\nCaches"))
        output.show(facts_table(versions, "\nVersions"))


def _machine() -> dict[str, Any]:
    import psutil

    from nearfar.runtime.memory import cgroups, hardware

    return {
        "physical_cores": hardware.physical_cores(),
        "usable_cpus": len(hardware.usable_cpus()),
        "logical_cpus": psutil.cpu_count() or 1,
        "cpu_quota_cores": cgroups.cpu_quota_cores(),
        "simd": sorted(hardware.simd_features()),
        "memory_bytes": hardware.total_memory_bytes(),
        "available_memory_bytes": hardware.available_memory_bytes(),
        "memory_limit_bytes": cgroups.memory_limit_bytes(),
        "huge_pages": hardware.huge_page_mode(),
    }


def _choices() -> dict[str, dict[str, str]]:
    from nearfar.runtime.memory import hardware

    device, device_reason = hardware.choose_device("auto")
    dtype, dtype_reason = hardware.choose_dtype("auto", device)
    threads = str(hardware.default_threads())
    return {
        "device": {"value": str(device), "reason": device_reason},
        "dtype": {"value": str(dtype).removeprefix("torch."), "reason": dtype_reason},
        "threads": {"value": threads, "reason": hardware.threads_reason()},
    }


def _versions() -> dict[str, str]:
    from nearfar.runtime.memory.hardware import versions

    return versions()


def _machine_facts(machine: dict[str, Any]) -> dict[str, str]:
    cores = f"{machine['physical_cores']} physical; {machine['usable_cpus']} of "
    cores += f"{machine['logical_cpus']} logical CPUs may be used"
    quota, limit = machine["cpu_quota_cores"], machine["memory_limit_bytes"]
    memory = f"{format_bytes(machine['available_memory_bytes'])} available of "
    memory += format_bytes(machine["memory_bytes"])
    return {
        "cores": cores,
        "CPU quota": "none" if quota is None else f"{quota:g} core{'' if quota == 1 else 's'}",
        "SIMD": " ".join(machine["simd"]) or "none that is known",
        "memory": memory,
        "memory limit": "none" if limit is None else format_bytes(limit),
        "huge pages": machine["huge_pages"],
    }


def _cache_folders() -> dict[str, Path]:
    from huggingface_hub import constants

    return {
        "nearfar": cache_root(),
        "hugging face": Path(constants.HF_HUB_CACHE),
    }


def _folder(path: Path) -> dict[str, Any]:
    """Size and writability; a folder that does not exist yet is as writable as its parent."""
    files = [entry for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink()]
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return {
        "path": str(path),
        "exists": path.exists(),
        "bytes": sum(file.stat().st_size for file in files),
        "writable": existing.is_dir() and os.access(existing, os.W_OK),
    }


def _folder_text(folder: dict[str, Any]) -> str:
    size = format_bytes(folder["bytes"]) if folder["exists"] else "not there yet"
    return f"{folder['path']}: {size}" + ("" if folder["writable"] else ", NOT WRITABLE")
