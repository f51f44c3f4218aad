"""The overhead of the harness of `nearfar compare` over bare generation of the same answers.

    python benchmarks/harness.py --context 2048 --rounds 6

Both take turns. Bare: the engine's own steps read the prompt's ids and generate as many tokens.
Harness: the same case from its number to its lines in a result file, including the making of the
case, the memory check, timing, scoring and writing. Seconds are the process's CPU time. With one
thread this is the time of an idle machine, even if other processes run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from nearfar import Engine
from nearfar.evaluation.harness.plan import Plan, Variation
from nearfar.evaluation.harness.results import Results
from nearfar.evaluation.harness.runner import Runner
from nearfar.evaluation.haystack import Haystack
from nearfar.evaluation.tasks.base import Material
from nearfar.evaluation.tasks.needle_grid import NeedleGrid
from nearfar.progress import silent


def main() -> None:
    """Take turns, print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    engine = Engine.from_pretrained(policy="full", threads=arguments.threads)
    task = NeedleGrid(questions_per_case=4)
    material = Material(engine.tokenizer, Haystack(), 0)
    bare, harness = [], []
    for number in range(-1, arguments.rounds):
        work = (engine, task, material, arguments.context, max(0, number))
        if number % 2:
            seconds, plain = in_harness(*work), alone(*work)
        else:
            plain, seconds = alone(*work), in_harness(*work)
        if number >= 0:  # the first round warms up
            harness.append(seconds)
            bare.append(plain)
            print(f"bare {plain:.2f} s, harness {seconds:.2f} s", flush=True)
    shares = np.array(harness) / np.array(bare) - 1
    low, middle, high = np.percentile(shares, (20, 50, 80))
    print(f"overhead {middle:+.1%} (p20 {low:+.1%}, p80 {high:+.1%}) of {np.median(bare):.2f} s")


def alone(engine: Engine, task: NeedleGrid, material: Material, context: int, number: int) -> float:
    """Seconds of reading one case, whose text exists already, and answering its questions."""
    case = task.case(number, context, material)
    prompt = case.prompt(engine.tokenizer)
    asked = [prompt.question_ids(each.text, each.opening) for each in case.questions]
    started = time.process_time()
    sequence = engine.new_sequence()
    engine.read_ids(sequence, prompt.prefix_ids, silent)
    mark = sequence.mark()
    for ids in asked:
        sequence.rewind(mark)
        engine.read_ids(sequence, ids[:-1], silent)
        token = ids[-1]
        for _ in range(task.max_new_tokens):
            token = int(engine.step([sequence], [token]).argmax())
            if token in engine.tokenizer.eos_token_ids:
                break
    return time.process_time() - started


def in_harness(
    engine: Engine, task: NeedleGrid, material: Material, context: int, number: int
) -> float:
    """Seconds of the same case, from its number to its rows on disk."""

    class One(NeedleGrid):
        def case(self, _: int, context_tokens: int, material: Material):  # type: ignore[no-untyped-def]
            return super().case(number, context_tokens, material)

    plan = Plan(
        [One(questions_per_case=task.questions_per_case)],
        [context],
        [Variation("full", None)],
        task.questions_per_case,
    )
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, Results(Path(folder) / "r.jsonl") as results:
        Runner(engine, plan, material, results, lambda *_: None).run()
    return time.process_time() - started


if __name__ == "__main__":
    main()
