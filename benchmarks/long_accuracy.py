"""The loss of `sketch` against exact attention at a model's full context length.

    python benchmarks/long_accuracy.py --context 131072 --facts 72

Facts are planted at even depths of a long text, and one question is asked for each, under exact
attention and under `sketch`. The result is the number of facts found and the number of answers that
differ. Then, in every layer, at the queries of answers under exact attention, the output of
attention over the keys that `sketch` would read is compared with that over all keys. Needs a GPU.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearfar import Engine, SamplingConfig
from nearfar.config import Budget
from nearfar.evaluation.needles import Needle, needle_document
from nearfar.lsh.near_sketch import SketchLaw
from nearfar.policies.near_codes import NearCodes, NearCodeSelector
from nearfar.policies.registry import create_policy
from nearfar.policies.sketch import Sketch
from nearfar.records import DrawnKeys, FarView
from nearfar.runtime.engine.document import Document
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.layers import Attention

TEXT = Path(__file__).parent.parent / "examples" / "carrow_point.md"
ANSWER_TOKENS = 24
ERROR_QUESTIONS, ERROR_TOKENS = 4, 6


def answers(document: Document, facts: list[Needle]) -> list[str]:
    """A document's answer for every fact."""
    sampling = SamplingConfig(max_new_tokens=ANSWER_TOKENS)
    return [document.ask(fact.question, sampling).text for fact in facts]


class AttentionErrors:
    """Errors of attention over the draws of `sketch`, for a sequence that keeps all rows near."""

    def __init__(self, engine: Engine, budget: int, spec: str) -> None:
        self._engine, self._budget = engine, Budget(budget)
        policy = create_policy(spec)
        assert isinstance(policy, Sketch), "only the policy sketch has what is measured here"
        self._policy = policy
        self._index: NearCodes | None = None
        self._length = 0
        self.errors: list[float] = []
        self.read: list[float] = []

    def take(self, sequence: Sequence, token: int) -> int:
        """Decode one token exactly and measure every layer; return the next token."""
        decoder = self._engine.decoder
        hidden = decoder.embed(torch.tensor([token], device=decoder.device))
        position = torch.tensor([sequence.next_position], device=decoder.device)
        angles = decoder.angles(position)

        def attend(mixer: Attention, qkv: torch.Tensor) -> torch.Tensor:
            layer = mixer.far_layer
            q, k, v = mixer.heads(qkv, angles[layer])
            sequence.append(layer, k[0], v[0])
            query = q[0].float() * mixer.plan.scale
            near = sequence.near[layer]
            exact = _attend(query, near.keys, near.values, None)
            self._measure(layer, query, near.keys, near.values, exact, sequence.tokens)
            return exact.view(1, -1).to(qkv.dtype)

        decoder.run(hidden, attend)
        sequence.finish_step()
        return int(decoder.logits(hidden)[0].argmax())

    def prepare(self, sequence: Sequence) -> None:
        """Encode the far keys of ``sequence``: all but sinks and window."""
        settings, device = sequence.settings, self._engine.decoder.device
        geometry = settings.geometry
        self._index = NearCodes(self._policy.bits, geometry, device)
        self._length = sequence.tokens - settings.sinks - settings.window
        for layer, near in enumerate(sequence.near):
            keys = near.keys[:, settings.sinks : settings.sinks + self._length]
            rows = torch.empty(0, 0, 2 * geometry.head_dim)
            self._index.extend(layer, FarView(rows, self._length), keys)
        capacity = self._index.layers[0].capacity_tokens
        policy = self._policy
        law = SketchLaw(policy.bits, policy.exponent, policy.per == "head", settings.seed)
        self._selector = NearCodeSelector(law, geometry, 1, capacity, device)
        self._selector.bind([self._index])
        rows_, size = self._selector.rows_per_sequence, self._selector.segment_keys
        segments = -(-capacity // size)
        self._drawn = DrawnKeys(
            torch.zeros(rows_, segments, size, dtype=torch.int64, device=device),
            torch.zeros(rows_, segments, 2, dtype=torch.int32, device=device),
            torch.zeros(rows_, segments, 0, dtype=torch.int64, device=device),
            torch.zeros(rows_, segments, dtype=torch.int32, device=device),
            *(torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)),
        )

    def _measure(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, exact: Tensor, step: int
    ) -> None:
        sinks = self._engine.config.sinks
        if layer == 0:
            self._selector.start_step()

        def number(value: int) -> Tensor:
            return torch.tensor([value], dtype=torch.int32, device=query.device)

        sizes = (number(self._length), number(self._budget.keys(self._length)), number(step))
        self._drawn.counts.zero_()
        self._selector.select(layer, query[None], *sizes, self._drawn)
        rows, heads = len(self._drawn.counts), len(query)
        for r in range(rows):
            used = torch.arange(self._drawn.chosen.shape[2], device=query.device)
            pairs = self._drawn.chosen[r][used < self._drawn.counts[r, :, :1]]
            far = (pairs & 0xFFFFFFFF) + sinks
            weights = (pairs >> 32).int().view(torch.float32)
            near = torch.cat(
                [torch.arange(sinks), torch.arange(sinks + self._length, keys.shape[1])]
            ).to(query.device)
            chosen = torch.cat([near, far])
            log_weights = torch.cat([torch.zeros(len(near), device=query.device), weights])
            mine = slice(r * heads // rows, (r + 1) * heads // rows)
            head = mine.start * keys.shape[0] // heads
            part = (keys[head : head + 1, chosen], values[head : head + 1, chosen])
            got = _attend(query[mine], *part, log_weights)
            error = (got - exact[mine]).norm(dim=1) / exact[mine].norm(dim=1)
            self.errors += error.tolist()
            self.read.append(float(len(far)))


def _attend(query: Tensor, keys: Tensor, values: Tensor, log_weights: Tensor | None) -> Tensor:
    """Attention [Hq, D] float32 of scaled queries over keys [Hkv, N, D]."""
    grouped = query.view(len(keys), -1, query.shape[1])
    logits = grouped @ keys.float().transpose(1, 2)
    if log_weights is not None:
        logits = logits + log_weights
    return (logits.softmax(-1) @ values.float()).view(query.shape)


def main() -> None:
    """Ask, compare, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=131_072)
    parser.add_argument("--facts", type=int, default=72)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--policy", default="sketch")
    arguments = parser.parse_args()
    base = Engine.from_pretrained(budget=arguments.budget, policy="full")
    room = arguments.context - 200  # for the question and its answer
    text, facts = needle_document(
        TEXT.read_text(), lambda t: len(base.tokenizer.encode(t)), room, arguments.facts
    )
    found: dict[str, Any] = {"context_tokens": arguments.context, "facts": len(facts)}
    exact = base.read(text)
    said = {"full": answers(exact, facts)}
    said[arguments.policy] = answers(base.with_policy(arguments.policy).read(text), facts)
    for policy, texts in said.items():
        found[policy] = sum(f.value in t for f, t in zip(facts, texts, strict=True))
    pairs = zip(*said.values(), strict=True)
    values = [f.value for f in facts]
    found["answers_that_differ"] = sum(a != b for a, b in zip(*said.values(), strict=True))
    found["facts_that_differ"] = sum(
        (v in a) != (v in b) for v, (a, b) in zip(values, pairs, strict=True)
    )
    print(found, flush=True)
    measure = AttentionErrors(base, arguments.budget, arguments.policy)
    for fact in facts[:: max(1, len(facts) // ERROR_QUESTIONS)][:ERROR_QUESTIONS]:
        exact.ask(fact.question, SamplingConfig(max_new_tokens=1))
        sequence = exact.sequence
        measure.prepare(sequence)
        token = base.tokenizer.encode("The")[0]
        for _ in range(ERROR_TOKENS):
            token = measure.take(sequence, token)
    errors = torch.tensor(measure.errors)
    found["attention_error_mean"] = float(errors.mean())
    found["attention_error_p80"] = float(errors.quantile(0.8))
    found["keys_read_mean"] = sum(measure.read) / len(measure.read)
    found["attention_outputs"] = len(errors)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
