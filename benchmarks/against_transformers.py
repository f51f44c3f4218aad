"""Prefill and decode beside transformers' own `generate`, on the same weights and the same prompt.

    python benchmarks/against_transformers.py --contexts 4096 16384 --repeats 3

Contenders take turns within each repeat, so that a slower machine slows all of them.
Prints the ceiling of a decoded token, then medians with the range over repeats; the last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nearfar import Engine
from nearfar.evaluation.bandwidth import sequential_bytes_per_second
from nearfar.evaluation.rivals import twin_of
from nearfar.runtime.models.weights import total_bytes
from nearfar.runtime.steps.prefill import prefill

TEXT = Path(__file__).parent.parent / "examples" / "carrow_point.md"


class Run(NamedTuple):
    """One run of one contender."""

    prefill_tokens_per_second: float
    milliseconds_per_token: float


def ours(engine: Engine, prompt: torch.Tensor, new_tokens: int) -> Run:
    """Greedy decoding by the engine."""
    sequence = engine.new_sequence()
    started = time.perf_counter()
    token = prefill(engine.decoder, sequence, prompt, engine.chunk_tokens).argmax()
    read = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = engine.step([sequence], [int(token)])[0].argmax()
    done = time.perf_counter()
    sequence.close()
    return Run(len(prompt) / (read - started), (done - read) / (new_tokens - 1) * 1e3)


class Clock:
    """A streamer that records the times of tokens; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        """Note one token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to finish."""


def theirs(model: Any, prompt: torch.Tensor, new_tokens: int) -> Run:
    """Greedy decoding by transformers."""
    clock = Clock()
    started = time.perf_counter()
    model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    first, last = clock.times[1], clock.times[-1]
    return Run(len(prompt) / (first - started), (last - first) / (new_tokens - 1) * 1e3)


def measure(
    contenders: dict[str, Callable[[torch.Tensor, int], Run]],
    prompt: torch.Tensor,
    repeats: int,
    new_tokens: int,
) -> list[dict[str, Any]]:
    """One row for each contender; they take turns."""
    for run in contenders.values():
        run(prompt[:300], 4)  # compile, warm up
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            runs[name].append(run(prompt, new_tokens))
    rows = []
    for name, done in runs.items():
        row: dict[str, Any] = {"contender": name, "context_tokens": len(prompt)}
        for field in Run._fields:
            values = sorted(getattr(one, field) for one in done)
            row[field] = round(statistics.median(values), 1)
            row[field + "_range"] = [round(values[0], 1), round(values[-1], 1)]
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--policies", nargs="+", default=["full", "sketch"])
    arguments = parser.parse_args()
    engine = Engine.from_pretrained(policy=arguments.policies[0], dtype=arguments.dtype)
    weights = engine.decoder.weights
    rate = sequential_bytes_per_second(engine.decoder.device)
    floor = total_bytes(weights) / rate * 1e3
    print(f"{engine.dtype}, {torch.get_num_threads()} threads, {rate / 1e9:.1f} GB/s sequential")
    print(f"ceiling: the weights alone take {floor:.1f} ms a token", flush=True)
    twin = twin_of(engine.decoder)
    contenders: dict[str, Callable[[torch.Tensor, int], Run]] = {
        "transformers": lambda prompt, count: theirs(twin, prompt, count)
    }
    for policy in arguments.policies:
        contender = engine.with_policy(policy)
        contenders[f"nearfar {policy}"] = lambda prompt, count, contender=contender: ours(  # type: ignore[misc]
            contender, prompt, count
        )
    text = engine.tokenizer.encode(TEXT.read_text())
    rows = []
    for context in arguments.contexts:
        prompt = torch.tensor((text * (context // len(text) + 1))[:context])
        rows += measure(contenders, prompt, arguments.repeats, arguments.new_tokens)
    print(json.dumps({"dtype": engine.dtype, "floor_ms_per_token": floor, "rows": rows}))


if __name__ == "__main__":
    main()
