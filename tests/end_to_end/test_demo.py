"""What `make demo` shows: sketch finds the planted facts, streaming-llm has forgotten them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_SECONDS

DOCUMENT = Path(__file__).parents[2] / "examples" / "carrow_point.md"
FACTS = {
    "What was the combination of the oil store's lock?": "7351",
    "What was the supply boat called?": "Patient Margaret",
    "What was the telegraph code word of the station?": "Marigold",
    "What was the ring number of the oldest petrel?": "40926",
}


def ask(policy: str) -> dict[str, Any]:
    questions = [part for question in FACTS for part in ("-q", question)]
    options = ["--policy", policy, "--max-new-tokens", "16", "--json", "--no-cache"]
    done = subprocess.run(
        [sys.executable, "-m", "nearfar", "qa", str(DOCUMENT), *questions, *options],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def found(record: dict[str, Any]) -> list[bool]:
    answers = record["answers"]
    return [FACTS[a["question"]].lower() in a["answer"].lower() for a in answers]


@pytest.mark.model
@pytest.mark.slow
def test_sketch_remembers_what_streaming_llm_forgets() -> None:
    remembered, forgotten = ask("sketch"), ask("streaming-llm")
    assert all(found(remembered)), remembered["answers"]
    assert not any(found(forgotten)), forgotten["answers"]
    for record in (remembered, forgotten):
        assert 5_500 < record["context_tokens"] < 6_500
        assert record["prefill_seconds"] > 0
        assert record["peak_rss_bytes"] > record["near_bytes"] > 0
        assert record["peak_gpu_bytes"] >= 0
        for answer in record["answers"]:
            assert 0 < answer["new_tokens"] <= 16
            assert answer["seconds_to_first_token"] > 0
            assert answer["tokens_per_second"] > 0
    assert remembered["far_bytes"] > 100 * 2**20
    assert remembered["index_bytes"] < remembered["far_bytes"] / 4
    # K and V of about 1,024 keys of 3 KV heads in 30 layers, 256 bytes each
    read = remembered["far_bytes_read_per_token"]
    assert read == pytest.approx(1024 * 3 * 30 * 256, rel=0.05)
    assert forgotten["far_bytes"] == forgotten["index_bytes"] == 0
    # the same number of keys as sketch reads, in the type that suits this machine
    row_bytes = 2 * 64 * {"bfloat16": 2, "float32": 4}[forgotten["dtype"]]
    assert forgotten["near_bytes"] == (4 + 64 + 1024) * 3 * 30 * row_bytes
