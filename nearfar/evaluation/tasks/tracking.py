"""Variable tracking: RULER's `vt`, one chain of assignments hidden in noise."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from nearfar.evaluation.scores import share_found
from nearfar.evaluation.tasks.base import AskTask, Case, Material, Metric, Question, largest_case
from nearfar.evaluation.tasks.niah import NOISE

TRACKED = Metric("variables found", "%", higher_is_better=True)
EXAMPLE_LINES = 8  # of noise in the solved example, which has at most 500 tokens
_BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


@dataclass(frozen=True)
class VariableTracking(AskTask):
    """`VAR A = 12345`, `VAR B = VAR A` and so on; all variables with that value are asked for."""

    name: str = "vt"
    hops: int = 4
    max_new_tokens: int = 30

    metric = TRACKED

    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """A solved example with shorter names, then the task in as much noise as fits."""
        seed = material.draws(self.name, context_tokens, number).random()

        def make(lines: int) -> Case:
            rng = random.Random(seed)
            example, question, names = self._chain(EXAMPLE_LINES, 3, rng)
            solved = f"{example}{question.text}{question.opening} {' '.join(names)}\n\n"
            context, question, names = self._chain(lines, 5, rng)
            return Case(solved + context, (question,))

        return largest_case(make, material.tokenizer, context_tokens, context_tokens // 24)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Share of the variables that are in the prediction."""
        return share_found(prediction, references)

    def _chain(
        self, noise_lines: int, letters: int, rng: random.Random
    ) -> tuple[str, Question, tuple[str, ...]]:
        value = rng.randint(10_000, 99_998)
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [name] * (name not in names)
        assigned = [str(value), *(f"VAR {name} " for name in names[:-1])]
        chain = [f"VAR {name} = {given}" for name, given in zip(names, assigned, strict=True)]
        lines = [NOISE] * noise_lines
        places = sorted(rng.randint(0, noise_lines) for _ in chain)
        for place, link in reversed(list(zip(places, chain, strict=True))):
            lines.insert(place, link)
        question = Question(
            f"\nQuestion: Find all variables that are assigned the value {value} in the text "
            "above.",
            tuple(names),
            self.max_new_tokens,
            opening=(
                " Answer: According to the chain(s) of variable assignment in the text above, "
                f"{len(names)} variables are assigned the value {value}, they are: "
            ),
        )
        return _BEFORE + "\n".join(lines), question, tuple(names)


TASKS = (VariableTracking(),)
