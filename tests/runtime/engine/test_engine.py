from __future__ import annotations

import gc
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_engine import tiny_engine
from tiny_folder import make_folder, make_stop, text_of

from nearfar.config import EngineConfig, SamplingConfig
from nearfar.errors import (
    ContextTooLongError,
    InvalidOptionError,
    OutOfMemoryError,
    UnknownNameError,
)
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.prepared import prepare
from nearfar.runtime.models.weights import total_bytes

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "far_dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "sinks": 3,
    "window": 8,
    "budget": 16,
}
TEN = SamplingConfig(max_new_tokens=10)
WARM = SamplingConfig(max_new_tokens=10, temperature=0.8, top_p=0.9, seed=4)
PROMPTS = [text_of(40, seed=1), "the", text_of(90, seed=2), text_of(7, seed=3)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_folder(folder)


@pytest.fixture(scope="module")
def folder(model_folder: tuple[Path, Any]) -> Path:
    return model_folder[0]


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load(folder)


def load(folder: Path, **settings: Any) -> Engine:
    return Engine.from_pretrained(str(folder), EngineConfig(**SETTINGS), **settings)


@pytest.mark.parametrize("policy", ["full", "full-far"])
def test_greedy_text_is_what_transformers_generates(
    model_folder: tuple[Path, Any], engine: Engine, policy: str
) -> None:
    model = model_folder[1]
    exact = engine.with_policy(policy)
    for prompt in PROMPTS:
        ids = engine.tokenizer.encode(prompt)
        got = exact.generate(prompt, TEN)
        wanted = model.generate(
            torch.tensor([ids]), max_new_tokens=10, do_sample=False, eos_token_id=None
        )
        assert list(got.token_ids) == wanted[0, len(ids) :].tolist()
        assert engine.tokenizer.decode(got.token_ids).startswith(got.text)  # whole characters
        assert (got.prompt_tokens, got.new_tokens) == (len(ids), 10)


@pytest.mark.parametrize("sampling", [TEN, WARM])
@pytest.mark.parametrize("policy", ["full", "full-far", "sketch", "h2o", "streaming-llm"])
def test_several_prompts_give_what_each_gives_alone(
    engine: Engine, policy: str, sampling: SamplingConfig
) -> None:
    engine = engine.with_policy(policy)
    together = engine.generate(PROMPTS, sampling)
    for prompt, got in zip(PROMPTS, together, strict=True):
        alone = engine.generate(prompt, sampling)
        assert (got.text, got.token_ids) == (alone.text, alone.token_ids)
        assert (got.finish_reason, got.prompt_tokens) == (alone.finish_reason, alone.prompt_tokens)
        assert got.far_bytes_read_per_token == alone.far_bytes_read_per_token
    assert len({got.token_ids for got in together}) == len(PROMPTS)


def test_no_prompts_give_no_generations(engine: Engine) -> None:
    assert engine.generate([]) == []


def test_stream_says_what_generate_does(engine: Engine) -> None:
    stream = engine.stream(PROMPTS[0], TEN)
    pieces = list(stream)
    whole = engine.generate(PROMPTS[0], TEN)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.result.text == whole.text
    assert stream.result.token_ids == whole.token_ids
    assert stream.result is stream.result


def test_seed_and_temperature_change_the_text(engine: Engine) -> None:
    texts = [
        engine.generate(PROMPTS[0], SamplingConfig(10, temperature=t, seed=seed)).token_ids
        for t, seed in ((0.0, 0), (0.0, 1), (2.0, 0), (2.0, 1), (2.0, 0))
    ]
    assert texts[0] == texts[1]
    assert texts[2] == texts[4]
    assert len(set(texts)) == 3


def test_stop_token_of_the_model_ends_the_text(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    free = load(folder).generate(PROMPTS[0], TEN)
    stop = next(t for i, t in enumerate(free.token_ids) if i > 2 and t not in free.token_ids[:i])
    make_stop(tmp_path / "model", stop)
    got = load(tmp_path / "model").generate(PROMPTS[0], TEN)
    assert got.token_ids == free.token_ids[: free.token_ids.index(stop)]
    assert (got.finish_reason, free.finish_reason) == ("stop", "length")


def test_context_of_the_model_ends_the_text(folder: Path, tmp_path: Path) -> None:
    make_folder(tmp_path, context=50)
    engine = load(tmp_path, policy="full")
    prompt = text_of(8)
    count = len(engine.tokenizer.encode(prompt))
    assert 5 < count < 45
    got = engine.generate(prompt, SamplingConfig(max_new_tokens=200))
    assert (got.finish_reason, got.new_tokens) == ("context", 51 - count)
    endless = engine.with_policy("streaming-llm").generate(prompt, SamplingConfig(200))
    assert (endless.finish_reason, endless.new_tokens) == ("length", 200)
    message = r"The text has \d+ tokens and the model reads at most 50\. Shorten it, split it"
    with pytest.raises(ContextTooLongError, match=message):
        engine.generate(text_of(100))


@pytest.mark.parametrize("prompt", ["", ["the", ""]])
def test_empty_prompt_is_refused(engine: Engine, prompt: Any) -> None:
    with pytest.raises(InvalidOptionError, match=r"^A prompt must not be empty\.$"):
        engine.generate(prompt)
    assert engine._ledger.used_bytes == 0


def test_far_cap_stops_a_text_and_gives_memory_back(engine: Engine) -> None:
    block_bytes = 256 * 2 * 2 * 6 * 4 * 3  # of three layers
    capped = engine.with_config(
        engine.config.replace(far_memory_bytes=3 * block_bytes // 2, policy="full-far")
    )
    long = SamplingConfig(max_new_tokens=500)
    message = r"^Far memory is full: .* needed, .* allowed\. Raise --far-memory, choose a smaller "
    with pytest.raises(OutOfMemoryError, match=message):
        capped.generate(PROMPTS[2], long)
    gc.collect()  # the error's traceback holds what was read
    assert capped._ledger.used_bytes == 0
    assert capped.generate("the", TEN).new_tokens == 10


def test_prompts_that_do_not_fit_beside_each_other_are_refused_unread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_bytes = 256 * 2 * 2 * 6 * 4 * 3
    capped = engine.with_config(
        engine.config.replace(far_memory_bytes=3 * block_bytes // 2, policy="full-far")
    )
    assert len(capped.generate(PROMPTS[:2], TEN)) == 2  # all of a short one is near
    monkeypatch.setattr(capped, "new_sequence", None)  # nothing is read
    with pytest.raises(OutOfMemoryError, match=r"Not enough far memory: 144\.0 KiB needed"):
        capped.generate(PROMPTS, TEN)


@pytest.mark.parametrize("act", ["generate", "stream"])
def test_a_prompt_that_does_not_fit_is_refused_unread(
    engine: Engine, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = engine.tokenizer.encode(PROMPTS[2])
    capped = engine.with_config(
        engine.config.replace(near_memory_bytes=engine.plan(len(ids)).near_bytes - 1)
    )
    monkeypatch.setattr(capped, "new_sequence", None)
    with pytest.raises(OutOfMemoryError, match=r"Not enough near memory.* tokens would fit\."):
        getattr(capped, act)(PROMPTS[2], TEN)


def test_stream_left_behind_gives_memory_back(engine: Engine) -> None:
    capped = engine.with_policy("full-far")
    stream = capped.stream(PROMPTS[2], TEN)
    next(stream)
    assert capped._ledger.used_bytes > 0
    assert capped.memory_report().far_bytes == capped._ledger.used_bytes
    del stream
    assert capped._ledger.used_bytes == 0
    assert capped.memory_report().far_bytes == 0


@pytest.mark.parametrize("far_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("policy", ["full-far", "sketch"])
def test_type_of_far_memory(engine: Engine, far_dtype: str, policy: str) -> None:
    config = engine.config.replace(far_dtype=far_dtype, policy=policy, budget=1000)
    small = engine.with_config(config)
    exact = engine.with_policy("full").generate(PROMPTS[0], TEN)
    got = small.generate(PROMPTS[0], TEN)
    assert got.token_ids[:3] == exact.token_ids[:3]
    item_bytes = 4 if far_dtype == "float32" else 2
    assert got.far_bytes_read_per_token % (2 * 6 * item_bytes) == 0
    document = small.read(text_of(300))
    assert small.memory_report().far_bytes % (256 * 2 * 2 * 6 * item_bytes) == 0
    assert document._held.sequence.far.store.dtype == getattr(torch, far_dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_type_of_weights(folder: Path, dtype: str) -> None:
    engine = load(folder, dtype=dtype)
    assert engine.dtype == dtype
    assert engine.device == "cpu"
    assert engine.generate(PROMPTS[0], TEN).new_tokens == 10


def test_other_policy_shares_weights_and_keeps_settings(engine: Engine) -> None:
    other = engine.with_policy("sketch:bits=2")
    assert other.decoder is engine.decoder
    assert other.tokenizer is engine.tokenizer
    assert other.config == engine.config.replace(policy="sketch:bits=2")
    assert other.policy != engine.policy
    changed = engine.with_config(EngineConfig(dtype="float16", device="cuda", window=9))
    assert (changed.dtype, changed.device) == (engine.dtype, engine.device)
    assert (changed.config.dtype, changed.config.window) == ("float32", 9)


def test_report_sums_what_is_held(engine: Engine) -> None:
    engine = engine.with_policy("sketch")
    empty = engine.memory_report()
    assert (empty.near_bytes, empty.far_bytes, empty.index_bytes) == (0, 0, 0)
    assert empty.weight_bytes == total_bytes(engine.decoder.weights)
    documents = [engine.read(text_of(words, seed=words)) for words in (300, 20)]
    parts, whole = [document.memory_report() for document in documents], engine.memory_report()
    for name in ("near_bytes", "far_bytes", "index_bytes"):
        values = [getattr(part, name) for part in parts]
        assert getattr(whole, name) == sum(values)
        assert min(values) > 0
        assert values[0] >= values[1]
    assert whole.peak_rss_bytes > whole.weight_bytes
    assert whole.peak_gpu_bytes == 0
    del documents[0]
    after = engine.memory_report()
    assert after.far_bytes == parts[1].far_bytes
    assert after.index_bytes == parts[1].index_bytes


def test_unknown_setting_is_named(folder: Path) -> None:
    known = (
        "'budget', 'chunk_tokens', 'device', 'dtype', 'far_dtype', 'far_memory_bytes', "
        "'near_memory_bytes', 'policy', 'seed', 'sinks', 'thinking', "
        "'threads', 'window'"
    )
    message = f"setting must be one of [{known}]. Got 'buget'."
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(message)}$"):
        load(folder, buget=3)


def test_wrong_policy_is_named_before_the_model_is_looked_for() -> None:
    with pytest.raises(UnknownNameError, match=r"^Unknown policy 'skech'\. Did you mean 'sketch'"):
        Engine.from_pretrained("no such model", policy="skech")


def test_plan_that_does_not_fit_costs_no_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(str(folder))
    monkeypatch.setattr(type(prepared.source), "load_weights", None)
    message = (
        r"^Not enough near memory: [\d.]+ MiB needed \(weights [\d.]+ KiB, near keys and values "
        r"\d+ B, asking [\d.]+ MiB\), 1\.0 KiB there\. Raise --near-memory"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        Engine.from_prepared(prepared, EngineConfig(near_memory_bytes=1024, device="cpu"))
    with pytest.raises(OutOfMemoryError, match=r"^Not enough far memory: .* Raise --far-memory"):
        Engine.from_prepared(
            prepared, EngineConfig(far_memory_bytes=1024, device="cpu"), context_tokens=4000
        )


def test_prepared_model_counts_tokens_before_it_is_loaded(folder: Path, engine: Engine) -> None:
    prepared = prepare(str(folder))
    assert prepared.config == engine.model_config
    text = text_of(50)
    prompt = prepared.document_prompt(text)
    assert len(prompt.prefix_ids) == engine.read(text).tokens == engine.read(prompt).tokens
    read = engine.generate(text, SamplingConfig(1)).prompt_tokens
    ids = prepared.prompt_ids(text, chat=False)
    assert len(ids) == read
    assert engine.stream(ids, TEN).result.text == engine.generate(text, TEN).text
    loaded = Engine.from_prepared(prepared, EngineConfig(**SETTINGS), context_tokens=1000)
    assert loaded.model_name == str(folder)
    assert loaded.generate(PROMPTS[1], TEN).text == engine.generate(PROMPTS[1], TEN).text


def test_random_weights_read_no_text() -> None:
    message = "A model with random weights has no tokenizer and reads no text. Load a real one."
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(message)}$"):
        tiny_engine().generate("the")
