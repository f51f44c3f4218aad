from __future__ import annotations

import pytest
import torch
from specs import representatives
from tiny_engine import decode, read, tiny_config, tiny_engine, tokens
from tiny_folder import make_folder

from nearfar.errors import OutOfMemoryError
from nearfar.policies.registry import create_policy, policy_names
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.shared_prefill import prefill_once, shared_prefill_bytes
from nearfar.runtime.memory.far_state import SPILL_TOKENS

SPECS = representatives(policy_names())
PROMPT = 211


def scored(spec: str) -> bool:
    return create_policy(spec).traits.needs_attention


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunk_tokens", [4096, 60])
def test_a_sequence_that_was_given_a_reading_equals_one_that_read(
    spec: str, chunk_tokens: int
) -> None:
    base = tiny_engine(policy="full", chunk_tokens=chunk_tokens)
    prompt, answer = tokens(PROMPT), tokens(SPILL_TOKENS + 9, seed=1)
    reading = prefill_once(base, prompt.tolist(), with_attention=scored(spec))
    engine = base.with_config(base.config.replace(policy=spec, budget=40))
    want = decode(engine, read(engine, prompt), answer)
    for _ in range(2):  # any number of sequences
        given = engine.new_sequence()
        reading.give_to(given)
        assert given.tokens == PROMPT
        assert torch.equal(decode(engine, given, answer), want)


@pytest.mark.parametrize("family", ["llama-yarn", "smollm3"])
def test_scaled_and_missing_rotation(tmp_path_factory: pytest.TempPathFactory, family: str) -> None:
    """Turning keys afterwards knows the factor of yarn and the layers without rotation."""
    folder = tmp_path_factory.mktemp(family)
    make_folder(folder, family=family)
    base = Engine.from_pretrained(str(folder), dtype="bfloat16", device="cpu", threads=1)
    prompt, answer = tokens(PROMPT), tokens(5, seed=1)
    reading = prefill_once(base, prompt.tolist(), with_attention=False)
    for spec in ("sketch", "streaming-llm"):
        engine = base.with_config(base.config.replace(policy=spec, budget=40))
        given = engine.new_sequence()
        reading.give_to(given)
        want = decode(engine, read(engine, prompt), answer)
        assert torch.equal(decode(engine, given, answer), want)


def test_one_token_and_layers_told() -> None:
    engine = tiny_engine(policy="sketch")
    told: list[tuple[int, int]] = []
    reading = prefill_once(
        engine, [7], with_attention=True, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 2), (2, 2)]
    assert reading.tokens == 1
    sequence = engine.new_sequence()
    reading.give_to(sequence)
    assert sequence.tokens == 1
    assert reading.num_bytes == shared_prefill_bytes(engine.model_config.geometry, torch.float32, 1)
    reading.close()
    assert reading.num_bytes == 0


def test_what_does_not_fit_is_refused_before_reading() -> None:
    engine = tiny_engine(tiny_config(layers=2), policy="full", far_memory_bytes=2**20)
    num_bytes = 2 * 2 * 2 * 16 * 3000 * 4  # layers, heads, K and V, dimensions, tokens, float32
    assert num_bytes == shared_prefill_bytes(engine.model_config.geometry, torch.float32, 3000)
    told: list[int] = []
    with pytest.raises(OutOfMemoryError) as caught:
        prefill_once(
            engine, [1] * 3000, with_attention=False, progress=lambda done, _: told.append(done)
        )
    assert told == []
    assert str(caught.value) == (
        "Keeping a prompt for several policies takes 1.5 MiB, and 1.0 MiB of host memory are "
        "allowed. Raise --far-memory or give shorter contexts."
    )


def test_a_reading_with_attention_also_serves_policies_that_need_none() -> None:
    base = tiny_engine(policy="full")
    prompt, answer = tokens(PROMPT), tokens(5, seed=1)
    reading = prefill_once(base, prompt.tolist(), with_attention=True)
    for spec in ("full", "sketch", "streaming-llm"):
        engine = base.with_config(base.config.replace(policy=spec, budget=40))
        given = engine.new_sequence()
        reading.give_to(given)
        want = decode(engine, read(engine, prompt), answer)
        torch.testing.assert_close(decode(engine, given, answer), want, rtol=1e-4, atol=1e-4)
