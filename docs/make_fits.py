"""Writes the table of what fits which card into README.md: `python docs/make_fits.py`.

It plans with `plan_memory`, as every command does before it loads weights. No GPU is needed.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from nearfar.config import GIB, EngineConfig
from nearfar.evaluation.shapes import SHAPES, shape_config
from nearfar.policies.registry import create_policy
from nearfar.runtime.engine.planning.memory_plan import MemoryPlan, plan_memory
from nearfar.runtime.engine.planning.memory_setup import MemorySetup

PAGE = Path(__file__).parents[1] / "README.md"
START, END = "<!-- table of docs/make_fits.py -->\n", "<!-- end of table -->"
CARDS_GIB = [8, 12, 16, 24, 48]
# name, shape, contexts held at once
ROWS = [
    ("Llama-3.2-1B", "llama-3.2-1b", 1),
    ("Llama-3.2-1B", "llama-3.2-1b", 4),
    ("Qwen2.5-7B", "qwen2.5-7b", 1),
    ("Qwen3-8B", "qwen3-8b", 1),
    ("Llama-3.1-8B", "llama-3.1-8b", 1),
    ("Llama-3.1-8B", "llama-3.1-8b", 4),
]


def plan(shape: str, policy: str, context_tokens: int, contexts: int = 1) -> MemoryPlan:
    """The plan of ``contexts`` in bfloat16 on a GPU."""
    model = shape_config(shape, context_tokens)
    place = (torch.bfloat16, torch.device("cuda"))
    setup = MemorySetup(model, EngineConfig(policy=policy), create_policy(policy), *place)
    return plan_memory(setup, context_tokens, contexts)


def longest_context(shape: str, policy: str, contexts: int, near_bytes: int) -> int:
    """Tokens that fit ``near_bytes`` on the GPU, at most the model's own length; 0 if none do."""
    fits, fails = 0, SHAPES[shape]["max_position_embeddings"] + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if plan(shape, policy, middle, contexts).near_bytes <= near_bytes:
            fits = middle
        else:
            fails = middle
    return fits


def table() -> str:
    """The table in Markdown: for each card the longest context under `full` and under `sketch`."""
    cards = " | ".join(f"{size} GiB" for size in CARDS_GIB)
    lines = [f"| model, its length | {cards} | far memory |", "| --- " * (len(CARDS_GIB) + 2) + "|"]
    for name, shape, contexts in ROWS:
        length = SHAPES[shape]["max_position_embeddings"]
        named = f"{name}, {_thousands(length)}" if contexts == 1 else f"{contexts} contexts of it"
        cells = [_cell(shape, contexts, size * GIB) for size in CARDS_GIB]
        far_gib = plan(shape, "sketch", length, contexts).far_bytes / GIB
        lines.append(f"| {' | '.join([named, *cells, f'{far_gib:.1f} GiB'])} |")
    return "\n".join(lines) + "\n"


def _cell(shape: str, contexts: int, near_bytes: int) -> str:
    policies = ("full", "sketch")
    tokens = [longest_context(shape, policy, contexts, near_bytes) for policy in policies]
    if not tokens[1]:
        return "-"
    return " / ".join(dict.fromkeys(_thousands(each) for each in tokens))


def _thousands(tokens: int) -> str:
    return f"{tokens // 1000}K"


def page(text: str) -> str:
    """``text`` with the table between its marks made anew."""
    place = re.compile(f"(?<={re.escape(START)}).*?(?={re.escape(END)})", re.DOTALL)
    return place.sub(lambda _: table(), text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
