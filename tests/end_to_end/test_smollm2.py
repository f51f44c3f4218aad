"""The built-in model, from its name to its answers, beside transformers'."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rounded_keys import rounding_errors
from safetensors import safe_open

from nearfar.config import DEFAULT_MODEL, SamplingConfig
from nearfar.progress import silent
from nearfar.runtime.checkpoints.builtin import BUILT_IN, adapter_path
from nearfar.runtime.checkpoints.download import fetch
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.steps.prefill import prefill

pytestmark = pytest.mark.model
MODEL = BUILT_IN[DEFAULT_MODEL]
NEW_TOKENS = 32
PROMPT = (
    "The lighthouse keeper climbed the stairs every evening at six. In 1911 he counted 214 steps, "
    "and his daughter, who was nine, counted 213; neither of them would give in. They asked the "
    "priest, who had never been up, and the doctor, who had been up once, at night, in a hurry. "
    "The priest said that it did not matter. The doctor said that it mattered a great deal, "
    "because a man who miscounts stairs will one day fall down them. So on a calm day in May all "
    "four went up together, counting aloud, each in a different voice:\n\n"
    "    for step in range(1, 215):\n        print(f'{step}!')\n\n"
    "Half way there is a window to the west. From it one sees the islands, the mail boat, and on "
    "clear evenings the other lighthouse, whose keeper had no stairs to count, because his tower "
    "was only a hut on a rock. When they came to the top, "
)
PLACES = ("harbour", "mill", "tower", "bridge", "market", "chapel", "garden", "school", "library")
QUESTION = "What is the secret code?"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(one_thread: None) -> Any:
    """The same model by transformers: its own reading of the GGUF, and the adapter's tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with safe_open(adapter_path(MODEL), framework="pt") as adapter:
        changes = {name: adapter.get_tensor(name).float() for name in adapter.keys()}  # noqa: SIM118
        rope_theta = float(adapter.metadata()["rope_theta"])
    with torch.device("meta"):  # tells only how tensors are called
        names = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30))
    path = str(fetch(MODEL.base, silent))
    read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=names)
    state: dict[str, torch.Tensor] = read["tensors"]
    config = LlamaConfig(**read["config"] | {"rope_theta": rope_theta})
    model = LlamaForCausalLM(config).float().eval()
    for name in [name for name in changes if not name.endswith(".lora_A")]:
        module = name.removesuffix(".lora_B")
        if module == name:
            state[f"model.{name}"] = changes[name]
        else:
            change = changes[name] @ changes[f"{module}.lora_A"]
            state[f"model.{module}.weight"] = state[f"model.{module}.weight"].float() + change
    missing = model.load_state_dict(state, strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    return model


@pytest.fixture(scope="module")
def engine(one_thread: None) -> Engine:
    return Engine.from_pretrained(
        policy="full", dtype="float32", far_dtype="float32", device="cpu", threads=1
    )


@torch.no_grad()
def test_logits_equal_transformers(engine: Engine, reference: Any) -> None:
    """After a prompt, and after every one of the tokens that greedy decoding adds."""
    prompt = torch.tensor(engine.tokenizer.encode(PROMPT))
    assert 180 < len(prompt) < 260
    output = reference(prompt[None], use_cache=True)
    wanted, ids = [output.logits[0, -1]], []
    for _ in range(NEW_TOKENS):
        ids.append(int(wanted[-1].argmax()))
        step = torch.tensor([[ids[-1]]])
        output = reference(step, past_key_values=output.past_key_values, use_cache=True)
        wanted.append(output.logits[0, -1])
    assert torch.stack(wanted).std() > 1
    for policy in ("full", "full-far"):
        exact = engine.with_policy(policy)
        sequence = exact.new_sequence()
        got = [prefill(exact.decoder, sequence, prompt, 64)]
        got += [exact.step([sequence], [i])[0] for i in ids]
        assert [int(logits.argmax()) for logits in got[:-1]] == ids
        torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=0, atol=1e-3)
        assert (sequence.far.store.length(0) > 100) == (policy == "full-far")
    greedy = engine.generate(PROMPT, SamplingConfig(max_new_tokens=8))
    assert list(greedy.token_ids) == ids[:8]


def planted_text() -> str:
    """About 1,500 tokens of a walk through a town, with one fact in the first half."""
    generator = random.Random(0)
    lines = [
        f"On day {day} we walked from the {a} to the {b}, and it {weather}."
        for day in range(1, 73)
        for a, b in [generator.sample(PLACES, 2)]
        for weather in [generator.choice(["rained", "snowed", "was warm", "was windy"])]
    ]
    lines.insert(24, "The secret code is 7391.")
    return " ".join(lines)


def test_retrieved_memory_answers_what_a_window_has_lost() -> None:
    engine = Engine.from_pretrained(policy="sketch", dtype="bfloat16", budget=64, threads=1)
    document = engine.read(planted_text())
    assert 1300 < document.tokens < 1700
    short = SamplingConfig(max_new_tokens=24)
    answer = document.ask(QUESTION, short)
    assert "7391" in answer.text
    assert answer.far_bytes_read_per_token < 0.2 * document.memory_report().far_bytes
    forgetful = engine.with_policy("streaming-llm").read(planted_text())
    assert "7391" not in forgetful.ask(QUESTION, short).text


def test_keys_rounded_by_channel_err_less_than_by_token(engine: Engine) -> None:
    """KIVI's finding on this model's own keys: a few channels of them are large."""
    ids = engine.tokenizer.encode(planted_text())[:401]
    errors = rounding_errors(engine, ids[:-1], ids[-1:])
    assert errors[2, "channel"] < errors[2, "token"] / 2
    assert errors[4, "channel"] < errors[4, "token"] / 1.3
    assert errors[4, "channel"] < errors[2, "channel"] / 4
    assert 0 < errors[4, "channel"] < 0.1
