"""Error of the attention output under policies that select far (host) keys, on a real model.

    python benchmarks/attention_error.py capture book.txt --tokens 32768     # minutes
    python benchmarks/attention_error.py measure --policies sketch lsh-tables topk-oracle

`capture` reads a text with exact attention and saves, for every layer, all keys and values and the
queries of the last tokens. `measure` lets policies select far keys for those queries and compares
the attention output of every head with the exact one: |out - exact| / |exact|, mean over layers,
queries and heads. Query i has the seed i modulo --seeds. The standard error is that of the mean
over queries, each of them the mean of its layers and heads. Sinks and window are exact, as in the
engine; the keys between them are far and indexed once. A policy is SPEC@BUDGET, such as
sketch:bits=2@1024 or topk-oracle:per=head@0.02; SPEC@BUDGET/int8 stores far rows as int8. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearfar import Engine
from nearfar.config import Budget
from nearfar.cpu_kernels.attend import attend_all, attend_selected
from nearfar.cpu_kernels.merge import merge_partials
from nearfar.policies.registry import create_policy
from nearfar.records import ALL, NONE, FarView, Geometry, Partial, Selection
from nearfar.runtime.steps.prefill import read_layer
from nearfar.storage import encode

FOLDER = Path("/tmp/nearfar-attention")
SINKS, WINDOW = 4, 64
POLICIES = (
    "sketch@1024",
    "sketch:per=head@1024",
    "sketch:bits=2@1024",
    "sketch:bits=1@1024",
    "lsh-tables@0.95",
    "topk-oracle@1024",
    "topk-oracle:per=head@1024",
    "full-far@1024/int8",
)


def capture(text: Path, tokens: int, queries: int, folder: Path) -> None:
    """Read ``tokens``, then one token for each query; write a file for each layer."""
    engine = Engine.from_pretrained(policy="full")
    ids = torch.tensor(engine.tokenizer.encode(text.read_text())[: tokens + queries])
    if len(ids) < tokens + queries:
        raise SystemExit(f"{text} has only {len(ids)} tokens, and {tokens + queries} are needed.")
    folder.mkdir(parents=True, exist_ok=True)
    decoder, sequence = engine.decoder, engine.new_sequence()
    hidden = decoder.embed(ids)
    last = torch.arange(len(ids) - queries, len(ids))
    for layer, own in enumerate(decoder.layers):
        started, mixer = time.perf_counter(), own.mixer
        assert mixer is not None
        qkv = hidden.new_empty(queries, mixer.qkv.out_features)
        mixer.qkv.into(hidden[-queries:], qkv, mixer.norm)
        asked = mixer.heads(qkv, decoder.angles(last)[layer])[0].float() * mixer.plan.scale
        read_layer(decoder, sequence, own, hidden, engine.chunk_tokens)
        near = sequence.near[layer]
        saved = {"keys": near.keys, "values": near.values, "queries": asked}
        torch.save({name: part.clone() for name, part in saved.items()}, folder / f"{layer:02}.pt")
        near.length = 0  # kept on disk
        print(f"layer {layer}: {time.perf_counter() - started:.1f} s", flush=True)


@dataclass
class Layer:
    """Far rows, near rows and queries of one layer, and the exact outputs."""

    far: FarView
    near: torch.Tensor  # [Hkv, sinks + window + queries, 2 D]
    queries: torch.Tensor  # [n, Hq, D]
    exact: torch.Tensor  # [n, Hq, D]

    def near_part(self, query: int) -> Partial:
        """Attention over the keys that are near at this query."""
        length = SINKS + WINDOW + query + 1
        return attend_all(self.queries[query], FarView(self.near, length))


def load(path: Path, dtype: torch.dtype) -> Layer:
    """A layer from `capture`, with far rows stored as ``dtype``."""
    saved = torch.load(path)
    queries = saved["queries"].contiguous()
    rows = torch.cat([saved["keys"], saved["values"]], 2)
    first_query = rows.shape[1] - len(queries)
    split = first_query - WINDOW
    middle = rows[:, SINKS:split].contiguous()
    near = torch.cat([rows[:, :SINKS], rows[:, split:]], 1).contiguous()
    layer = Layer(FarView(middle, middle.shape[1]), near, queries, torch.empty(0))
    exact = [
        merge_partials(layer.near_part(i), attend_all(query, layer.far)).out
        for i, query in enumerate(queries)
    ]
    layer.exact = torch.stack(exact)
    Hkv, N, width = middle.shape
    halves = encode(middle.view(Hkv, N, 2, -1), dtype)
    layer.far = FarView(halves.view(Hkv, N, width), N)
    return layer


@dataclass(frozen=True)
class Choice:
    """A policy, a budget and a storage type, from SPEC@BUDGET/TYPE."""

    spec: str
    budget: float
    storage: str

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The choice that ``text`` describes."""
        spec, _, rest = text.partition("@")
        budget, _, storage = rest.partition("/")
        return cls(spec, float(budget or 1024), storage or "bfloat16")


def errors(choice: Choice, layer: Layer, seeds: int) -> tuple[np.ndarray[Any, Any], float]:
    """Relative error [n] of each query in one layer, mean over heads, and the far rows read."""
    Hkv, _, width = layer.far.rows.shape
    geometry = Geometry(1, layer.queries.shape[1], Hkv, width // 2)
    indexes = []
    for seed in range(seeds):
        index = create_policy(choice.spec).new_index(geometry, Budget(choice.budget), seed)
        assert index is not None
        index.extend(0, layer.far)
        indexes.append(index)
    outs, read = [], 0
    for i, query in enumerate(layer.queries):
        near = layer.near_part(i)
        selection = indexes[i % seeds].select(0, query, layer.far, i)
        if isinstance(selection, Selection):
            far = attend_selected(query, layer.far, selection)
            read += len(selection.indices)
        elif selection is ALL:
            far = attend_all(query, layer.far)
            read += Hkv * layer.far.length
        else:
            assert selection is NONE
            continue
        outs.append(merge_partials(near, far).out)
    out = torch.stack(outs)
    relative = (out - layer.exact).norm(dim=-1) / layer.exact.norm(dim=-1)
    return relative.mean(1).numpy(), read / len(layer.queries)


def measure(choices: list[Choice], seeds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each choice."""
    paths = sorted(folder.glob("*.pt"))
    found: dict[Choice, list[tuple[np.ndarray[Any, Any], float]]] = {}
    for path in paths:
        for storage in {choice.storage for choice in choices}:
            layer = load(path, getattr(torch, storage))
            for choice in (c for c in choices if c.storage == storage):
                drawn = not choice.spec.startswith(("topk-oracle", "full-far"))
                found.setdefault(choice, []).append(errors(choice, layer, seeds if drawn else 1))
        print(f"{path.name} done", flush=True)
    rows = []
    for choice in choices:
        by_query = np.mean([relative for relative, _ in found[choice]], axis=0)
        read = float(np.mean([read for _, read in found[choice]]))
        row_bytes = layer.far.rows.shape[2] * getattr(torch, choice.storage).itemsize
        rows.append(
            {
                "policy": choice.spec,
                "budget": choice.budget,
                "storage": choice.storage,
                "error": float(by_query.mean()),
                "standard_error": float(by_query.std(ddof=1) / len(by_query) ** 0.5),
                "queries": len(by_query),
                "rows_read_by_layer": read,
                "bytes_read_by_token": read * row_bytes * len(paths),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Capture or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER)
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("capture")
    reading.add_argument("text", type=Path)
    reading.add_argument("--tokens", type=int, default=32_768)
    reading.add_argument("--queries", type=int, default=208)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--policies", nargs="+", default=POLICIES)
    measuring.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    if given.command == "capture":
        capture(given.text, given.tokens, given.queries, given.folder)
    else:
        choices = [Choice.parse(text) for text in given.policies]
        print(json.dumps(measure(choices, given.seeds, given.folder)))


if __name__ == "__main__":
    main()
