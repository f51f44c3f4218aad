"""Checks whether orderings that papers report hold here: which of two methods is better.

    python benchmarks/orderings.py --text book.txt
    python benchmarks/orderings.py --text book.txt --only kivi --json

Both sides get the same samples. The figure is the mean difference per sample with its 95 %
bootstrap interval: an ordering holds if the whole interval is on its side, and fails if the whole
interval is on the other. The papers' own numbers come from other models, texts and lengths and are
not reproduced here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import click
import torch
from ordered_pair import (
    EXACT,
    Ordering,
    Setting,
    Value,
    bytes_of,
    mean_of,
    ordering,
    pick,
    score,
    side,
    table,
)
from rounded_keys import BITS, SHARED, rounding_errors

from nearfar import Engine
from nearfar.config import Budget
from nearfar.evaluation.harness.plan import Variation
from nearfar.evaluation.haystack import Haystack
from nearfar.evaluation.tasks.base import Material
from nearfar.evaluation.tasks.niah import Niah
from nearfar.evaluation.tasks.text import DistancesTask, Perplexity
from nearfar.policies import registry
from nearfar.policies.lsh_tables import LshTables, LshTablesIndex
from nearfar.records import FarView, Geometry

SINKS = 4
SHARE = 5  # evicting policies keep one token in five, as in H2O's tables
PASSKEY_SHARES = (32, 8)  # Quest's budgets on passkeys are smaller still
UNCENTRED = "lsh-uncentred"
RIVALS = ("bits_per_table=10", "num_tables=300", "bits_per_table=9")  # uncentred; equal one first
QUANTISED_TOKENS = 4  # tokens whose attention over rounded rows is compared, in every layer


def sinks(setting: Setting) -> list[Ordering]:
    """StreamingLLM with and without sinks, in a cache of equal size."""
    kept, sides = setting.context // SHARE, []
    for count in (SINKS, 0):
        budget = kept - count - setting.engine.config.window
        streaming = Variation("streaming-llm", float(budget))
        rows = setting.rows([Perplexity()], [streaming], sinks=count)
        name = f"{count} + {kept - count:,} tokens"
        sides.append(side(rows, "perplexity", streaming, name=name))
    about = ("sinks", "StreamingLLM, arXiv 2309.17453, tables 1 and 2", "perplexity")
    return [ordering(about, *sides, exact=pick(rows, "perplexity", EXACT), logs=True)]


def heavy_hitters(setting: Setting) -> list[Ordering]:
    """H2O beside the most recent tokens, in a cache of equal size."""
    budget = float(setting.context // SHARE - SINKS - setting.engine.config.window)
    h2o, window = Variation("h2o", budget), Variation("streaming-llm", budget)
    rows = setting.rows([Perplexity(), DistancesTask()], [h2o, window], sinks=SINKS)
    found = []
    for task, measure, value in (
        ("perplexity", "perplexity", score),
        ("distances", "KL of the next token", score),
        ("distances", "error of attention", mean_of("error")),
    ):
        ours, theirs = (side(rows, task, each, value) for each in (h2o, window))
        logs = task == "perplexity"
        exact = pick(rows, task, EXACT) if logs else None
        about = ("h2o", "H2O, arXiv 2306.14048, tables 1 and 2", measure)
        found.append(ordering(about, ours, theirs, exact=exact, logs=logs))
    return found


def passkeys(setting: Setting) -> list[Ordering]:
    """Quest beside H2O, which scores the whole prompt; questions go through the policy."""
    task = Niah("niah_single_1", "noise", max_new_tokens=24)
    budgets = [float(setting.context // share) for share in PASSKEY_SHARES]
    pairs = [(Variation("quest", each), Variation("h2o", each)) for each in budgets]
    rows = setting.rows([task], [each for pair in pairs for each in pair], "strict")
    exact, found = pick(rows, task.name, EXACT), []
    for pair in pairs:
        about = ("quest", "Quest, arXiv 2406.10774, table 1", "passkeys found, %")
        ours, theirs = (side(rows, task.name, each) for each in pair)
        found.append(ordering(about, ours, theirs, exact=exact, higher=True))
    return found


class Uncentred(LshTables):
    """`lsh-tables` without centring of keys."""

    name = UNCENTRED

    def new_index(self, geometry: Geometry, budget: Budget, seed: int) -> LshTablesIndex:
        """Tables whose centre stays zero."""
        return _UncentredIndex(self, geometry, budget, seed)


class _UncentredIndex(LshTablesIndex):
    def extend(self, layer: int, far: FarView, arrived: torch.Tensor | None = None) -> None:
        # a centre that counts as the mean of all present keys is not computed again
        self._layers[layer] = replace(self._layers[layer], centred_on=far.length)
        super().extend(layer, far, arrived)


def centring(setting: Setting) -> list[Ordering]:
    """LSH of centred keys beside LSH of uncentred keys, with equal tables and at equal bytes.

    More tables or fewer bits read more keys. At equal bytes the rival is, of the uncentred tables
    that read at least as much as the centred ones, the one that reads least.
    """
    # a budget would only set the number of keys below which all are read
    centred = Variation("lsh-tables", 1.0)
    same, *others = (Variation(f"{UNCENTRED}:{each}", 1.0) for each in RIVALS)
    with patch.dict(registry.BUILT_IN, {UNCENTRED: f"{__name__}:Uncentred"}):
        rows = setting.rows([DistancesTask(following_tokens=8)], [centred, same, *others])
    read = {each: bytes_of(rows, each) for each in (centred, same, *others)}
    usable = [each for each in others if read[each] >= read[centred]]
    if not usable:
        raise click.ClickException("Uncentred tables read less than centred ones. Add to RIVALS.")
    rival = min(usable, key=lambda each: read[each])
    source = "MagicPIG, arXiv 2410.16179, centring"

    def beside(other: Variation, measure: str, value: Value, higher: bool = False) -> Ordering:
        ours, theirs = (
            side(rows, "distances", each, value, each.policy.removeprefix(f"{UNCENTRED}:"))
            for each in (centred, other)
        )
        return ordering(("centring", source, measure), ours, theirs, higher=higher)

    return [
        beside(same, "error of attention, equal tables", mean_of("error")),
        beside(rival, "error of attention, equal bytes", mean_of("error")),
        beside(rival, "KL of the next token, equal bytes", score),
        beside(rival, "softmax mass read, equal bytes", mean_of("mass"), higher=True),
    ]


def kivi(setting: Setting) -> list[Ordering]:
    """Keys rounded by channel beside keys rounded by token; values by token, as in KIVI."""
    task = DistancesTask(following_tokens=QUANTISED_TOKENS)
    found: dict[tuple[int, str], dict[tuple[int, int], float]] = defaultdict(dict)
    for number in range(setting.samples):
        case = task.case(number, setting.context, setting.material)
        ids = task.ids(case, setting.context, setting.material)
        for way, error in rounding_errors(setting.engine, *ids).items():
            found[way][number, 0] = error
    rows = []
    for bits in BITS:
        about = ("kivi", "KIVI, arXiv 2402.02750, table 2", f"error of attention, {bits} bits")
        ours, theirs = ((f"keys by {shared}", found[bits, shared], "") for shared in SHARED)
        rows.append(ordering(about, ours, theirs))
    return rows


ORDERINGS = {
    "sinks": sinks,
    "h2o": heavy_hitters,
    "quest": passkeys,
    "centring": centring,
    "kivi": kivi,
}


@click.command(help=__doc__)
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Else generated prose.")
@click.option("--only", type=click.Choice(list(ORDERINGS)), multiple=True)
@click.option("--context", default=2048, show_default=True, help="Tokens of a sample.")
@click.option("--samples", default=8, show_default=True)
@click.option("--threads", type=int)
@click.option("--json", "as_json", is_flag=True, help="One object, for programs.")
def main(
    text: Path | None,
    only: tuple[str, ...],
    context: int,
    samples: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure the selected orderings."""
    engine = Engine.from_pretrained(policy="full", threads=threads)
    haystack = Haystack(text.read_text(encoding="utf-8") if text else None)
    material = Material(engine.tokenizer, haystack, 0)
    setting = Setting(engine, material, context, samples)
    found = [each for name in only or ORDERINGS for each in ORDERINGS[name](setting)]
    if as_json:
        records = [asdict(each) | {"holds": each.holds} for each in found]
        click.echo(json.dumps({"context": context, "samples": samples, "orderings": records}))
    else:
        click.echo(table(found))


if __name__ == "__main__":
    main()
