"""What is planned is at least what reading and asking take at their most, and not much more."""

from __future__ import annotations

import pytest
import torch
from peaks import peak_bytes
from specs import tiny_specs
from tiny_engine import decode, read, tiny_config, tiny_engine, tokens

from nearfar.policies.registry import policy_names
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.sequence import Sequence
from nearfar.storage import FORMATS

TOKENS, QUESTION, ANSWER = 2300, 70, 2
LOOSE = 1.8  # a plan of a short context; what is fixed of it weighs less in a long one
DECODING = ["clusters", "sketch"]  # each in its own way, and a question decodes all rows
CASES = [(policy, "bfloat16") for policy in tiny_specs(policy_names())]
CASES += [(policy, name) for policy in tiny_specs(DECODING) for name in FORMATS]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "far_dtype"), dict.fromkeys(CASES))
def test_plan_covers_the_peaks(policy: str, far_dtype: str) -> None:
    engine = tiny_engine(
        tiny_config(heads=4, head_dim=32),
        policy=policy,
        far_dtype=far_dtype,
        budget=300,
        chunk_tokens=512,
    )
    _ask(engine, read(engine, tokens(1500)))  # what is only made once
    sequence = engine.new_sequence()
    store = sequence.far.store
    # far rows are mapped and seen by nobody else: counted as if all were there from the first
    reading = peak_bytes(lambda: read(engine, tokens(TOKENS), sequence)) + store.num_bytes
    held = store.num_bytes + sequence.far.index_bytes + _near_bytes(sequence)
    before = store.num_bytes
    asking = held + peak_bytes(lambda: _ask(engine, sequence)) + store.num_bytes - before
    plan = engine.plan(TOKENS)
    stays = plan.near_kv_bytes + plan.host_bytes
    assert reading <= stays + plan.prefill_bytes
    assert asking <= stays + plan.asking_bytes
    planned = plan.near_bytes + plan.host_bytes - plan.weight_bytes
    assert planned <= LOOSE * max(reading, asking)


def _ask(engine: Engine, sequence: Sequence) -> None:
    mark = sequence.mark()
    read(engine, tokens(QUESTION), sequence)
    decode(engine, sequence, tokens(ANSWER))
    sequence.rewind(mark)


def _near_bytes(sequence: Sequence) -> int:
    """Of all near arrays with their room."""
    held = [vars(each) for layer in sequence.layers for each in (layer.near, layer.ragged) if each]
    arrays = [a for fields in held for a in fields.values() if isinstance(a, torch.Tensor)]
    return sum(array.nbytes for array in arrays)
