"""Needle accuracy of every policy: planted facts at even depths, asked one by one.

    python benchmarks/needles.py --contexts 4096 8192 --facts 20

The haystack is the demo's text, repeated. A fact is found if its number is in the answer. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from nearfar import Engine, SamplingConfig, policy_names
from nearfar.evaluation.needles import needle_document

TEXT = Path(__file__).parent.parent / "examples" / "carrow_point.md"


def main() -> None:
    """Ask, count, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--budget", type=float, default=1024)
    parser.add_argument("--policies", nargs="+", default=policy_names())
    arguments = parser.parse_args()
    base = Engine.from_pretrained(budget=arguments.budget)
    rows = []
    for context in arguments.contexts:
        text, facts = needle_document(
            TEXT.read_text(), lambda t: len(base.tokenizer.encode(t)), context, arguments.facts
        )
        for policy in arguments.policies:
            started = time.perf_counter()
            document = base.with_policy(policy).read(text)
            answers = [document.ask(f.question, SamplingConfig(max_new_tokens=24)) for f in facts]
            found = sum(f.value in a.text for f, a in zip(facts, answers, strict=True))
            report = document.memory_report()
            row = {
                "policy": policy,
                "context_tokens": document.tokens,
                "found": found,
                "of": len(facts),
                "near_bytes": report.near_bytes,
                "far_bytes": report.far_bytes,
                "index_bytes": report.index_bytes,
                "far_bytes_read_per_token": sum(a.far_bytes_read_per_token for a in answers)
                / len(answers),
                "seconds": round(time.perf_counter() - started, 1),
            }
            rows.append(row)
            print(row, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
