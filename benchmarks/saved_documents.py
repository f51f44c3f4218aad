"""A saved document that other processes open: times, memory, answers.

    python benchmarks/saved_documents.py --contexts 32768 --folder /tmp/saved

Reads a text with planted facts, saves it, and asks questions in new processes: with the file in the
page cache and, after its eviction, from the disk; with questions read exactly and through the
policy. Two processes then ask at the same time, and the system reports each one's private memory
and its proportional share of common pages. The prefill time and the answers in memory stay in the
folder beside the file, so a second run does not prefill. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent.parent / "examples" / "carrow_point.md"
FACTS, ASKED = 20, 6
READINGS = ("exact", "policy")
MIB = 2**20
NEW_TOKENS = 24
END_SECONDS = 60  # a child must end within this time
THREADS = int(os.environ.get("NEARFAR_THREADS", "0")) or None


def main() -> None:
    """Read, save, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192])
    parser.add_argument("--policy", default="sketch")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nearfar-saved"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*arguments.child)
        return
    arguments.folder.mkdir(exist_ok=True)
    rows = []
    for context in arguments.contexts:
        row = {"context": context, **_read(context, arguments.policy, arguments.folder)}
        path = arguments.folder / f"{context}-{arguments.policy}.nearfar"
        for reading in READINGS:
            for cached in ("warm", "cold"):
                if cached == "cold":
                    _evict(path)
                one = _ask(path, arguments.policy, reading)
                _end(one[0])
                row[f"{reading} {cached}"] = one[1]
        row["together"] = _together(path, arguments.policy)
        _print(row)
        rows.append(row)
    print(json.dumps(rows))


def _facts(context: int, count_tokens: Any) -> tuple[str, Any]:
    from nearfar.evaluation.needles import needle_document

    text, facts = needle_document(TEXT.read_text(), count_tokens, context, FACTS)
    return text, facts[:: FACTS // ASKED][:ASKED]


def _read(context: int, policy: str, folder: Path) -> dict[str, Any]:
    """Read and save a document; return times, sizes and its answers in memory."""
    from nearfar import Engine

    path = folder / f"{context}-{policy}.nearfar"
    known = path.with_suffix(".json")
    if path.exists() and known.exists():
        row: dict[str, Any] = json.loads(known.read_text())
        return row
    engine = Engine.from_pretrained(policy=policy, threads=THREADS)
    text, facts = _facts(context, lambda t: len(engine.tokenizer.encode(t)))
    document = engine.read(text)
    questions = [(fact.question, fact.value) for fact in facts]
    answers = {reading: _answers(document, questions, reading) for reading in READINGS}
    report = document.memory_report()
    started = time.perf_counter()
    document.save(path)
    row = {
        "tokens": document.tokens,
        "questions": questions,
        "read_seconds": document.prefill_seconds,
        "save_seconds": time.perf_counter() - started,
        "file_bytes": path.stat().st_size,
        "held_bytes": report.far_bytes + report.index_bytes,
        "in_memory": answers,
        "memory": _memory(str(path)),
    }
    known.write_text(json.dumps(row))
    return row


def _answers(document: Any, questions: Any, reading: Any) -> dict[str, Any]:
    """The results of questions to a document, one after another."""
    from nearfar import SamplingConfig

    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS)
    answers = [document.ask(question, sampling, reading=reading) for question, _ in questions]
    return {
        "first_token_seconds": [a.seconds_to_first_token for a in answers],
        "tokens_per_second": [a.tokens_per_second for a in answers],
        "found": sum(value in a.text for (_, value), a in zip(questions, answers, strict=True)),
        "ids": [a.token_ids for a in answers],
    }


def _child(path: str, policy: str, reading: Any) -> None:
    """Open, ask, print, and wait until stdin ends."""
    from nearfar import Engine

    engine = Engine.from_pretrained(policy=policy, threads=THREADS)
    without = _memory(path)
    before = time.time()
    document = engine.open(path)
    opened = time.time() - before
    questions = json.loads(Path(path).with_suffix(".json").read_text())["questions"]
    since_start = time.time() - float(os.environ["STARTED"])
    said = _answers(document, questions, reading)
    since_start += said["first_token_seconds"][0]
    said |= {"open_seconds": opened, "process_to_first_token_seconds": since_start}
    print(json.dumps(said), flush=True)
    sys.stdin.readline()
    print(json.dumps({"before": without, "now": _memory(path)}), flush=True)
    sys.stdin.read()


def _memory(path: str) -> dict[str, int]:
    """Bytes of this process as the system counts them, and bytes mapped from the file."""
    rollup = dict(
        re.findall(r"^(\w+): +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    )
    of_file, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(path)
        elif inside and line.startswith("Rss:"):
            of_file += int(line.split()[1])
    private = int(rollup["Private_Clean"]) + int(rollup["Private_Dirty"])
    values = {"rss": int(rollup["Rss"]), "pss": int(rollup["Pss"]), "private": private}
    return {name: kib * 1024 for name, kib in {**values, "file_rss": of_file}.items()}


def _ask(path: Path, policy: str, reading: str) -> tuple[Any, dict[str, Any]]:
    """A process that has answered, and its output."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", str(path), policy, reading],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "STARTED": str(time.time())},
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def _together(path: Path, policy: str) -> list[dict[str, Any]]:
    """Memory of two running processes that have asked the same document."""
    processes = [_ask(path, policy, "exact")[0] for _ in range(2)]
    said = []
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
        said.append(json.loads(process.stdout.readline()))
    for process in processes:
        _end(process)
    return said


def _end(process: subprocess.Popen[str]) -> None:
    """End a child; if it does not end in time, kill it and raise."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def _evict(path: Path) -> None:
    """Evict a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _print(row: dict[str, Any]) -> None:
    print(f"\n{row['tokens']:,} tokens, read in {row['read_seconds']:.1f} s")
    ratio = row["file_bytes"] / row["held_bytes"]
    print(f"file {row['file_bytes'] / MIB:.1f} MiB, {ratio:.3f} x far and index")
    print(f"saved in {row['save_seconds']:.2f} s")
    for reading in READINGS:
        in_memory = row["in_memory"][reading]
        print(f"{reading}, in memory: {_described(in_memory, row)}")
        for cached in ("warm", "cold"):
            said = row[f"{reading} {cached}"]
            same = [list(ids) for ids in in_memory["ids"]] == said["ids"]
            print(
                f"{reading}, {cached}: opened in {said['open_seconds'] * 1000:.0f} ms, "
                f"{_described(said, row)}, process to first token "
                f"{said['process_to_first_token_seconds']:.1f} s, same ids: {same}"
            )
    _print_memory(row)


def _described(said: dict[str, Any], row: dict[str, Any]) -> str:
    first, *later = said["first_token_seconds"]
    return (
        f"first token {first:.2f} s ({first / row['read_seconds']:.2%} of reading), later "
        f"{_median(later):.2f} s, {_median(said['tokens_per_second']):.1f} tokens/s, "
        f"{said['found']} of {ASKED} found"
    )


def _print_memory(row: dict[str, Any]) -> None:
    for number, said in enumerate(row["together"], 1):
        now, before = said["now"], said["before"]
        print(
            f"process {number}: rss {now['rss'] / MIB:.0f}, pss {now['pss'] / MIB:.0f}, private "
            f"{now['private'] / MIB:.0f} MiB (before opening {before['private'] / MIB:.0f}), "
            f"of the file resident {now['file_rss'] / MIB:.0f}"
        )
    reader, second = row["memory"], row["together"][1]
    grown = second["now"]["private"] - second["before"]["private"]
    print(f"the process that read it: rss {reader['rss'] / MIB:.0f} MiB")
    print(f"private of the second / that: {second['now']['private'] / reader['rss']:.1%}")
    print(f"what opening and asking added to the second / that: {grown / reader['rss']:.1%}")


if __name__ == "__main__":
    main()
