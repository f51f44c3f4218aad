"""The examples in the documents run: README.md, docs/python.md, and CONTRIBUTING.md's policy."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_engine
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import nearfar
from nearfar.config import EngineConfig
from nearfar.policies import registry
from nearfar.runtime.text import tokenizer as tokenizer_module

ROOT = Path(nearfar.__file__).parents[1]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}<|end|>"
CONTRACT = ROOT / "tests" / "policies" / "test_contract.py"


def python_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.M | re.S)
    return [textwrap.dedent(block) for block in blocks]


def byte_tokenizer() -> tokenizer_module.Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return tokenizer_module.Tokenizer(made.to_str(), {"eos_token": "<|end|>"}, TEMPLATE)


def install_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine.from_pretrained gives a random model; its arguments are still checked."""
    tokenizer = byte_tokenizer()
    model = dataclasses.replace(tiny_engine.tiny_config(), vocab_size=tokenizer.vocab_size)
    parameters = inspect.signature(nearfar.Engine.from_pretrained)

    def from_pretrained(*arguments: Any, **keywords: Any) -> nearfar.Engine:
        given = parameters.bind(*arguments, **keywords).arguments
        config: EngineConfig = given.get("config", EngineConfig())
        config = config.replace(**given.get("settings", {}))
        config = config.replace(device="cpu", dtype="float32", threads=1)
        decoder = nearfar.Engine.random(model, config).decoder
        return nearfar.Engine("tiny", decoder, tokenizer, config)

    monkeypatch.setattr(nearfar.Engine, "from_pretrained", from_pretrained)


def test_python_examples_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_tiny_model(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("The keeper's daughter found the key under a stone. " * 30)
    blocks = python_blocks("docs/python.md")
    assert len(blocks) >= 8
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert isinstance(names["answer"], nearfar.Answer)
    assert names["report"].weight_bytes > 0
    assert [generation.prompt_tokens for generation in names["several"]] == [16, 21]
    assert names["engine"].config.far_memory_bytes == 8 * 2**30
    assert "Unknown policy 'skech'. Did you mean 'sketch'?" in capsys.readouterr().out


def test_the_example_of_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_tiny_model(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("The keeper's daughter found the key under a stone. " * 30)
    [block] = python_blocks("README.md")
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["document"].tokens > 1000
    assert capsys.readouterr().out


@pytest.fixture
def uniform(monkeypatch: pytest.MonkeyPatch) -> str:
    """CONTRIBUTING.md's policy, registered as its step 3 says; its name."""
    [source] = python_blocks("CONTRIBUTING.md")
    module = types.ModuleType("contributed_policy")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "CONTRIBUTING.md", "exec"), module.__dict__)
    monkeypatch.setitem(registry.BUILT_IN, "uniform", "contributed_policy:Uniform")
    return "uniform"


def test_the_contributed_policy_keeps_the_contract(uniform: str) -> None:
    spec = importlib.util.spec_from_file_location("contract_for_the_example", CONTRACT)
    assert spec is not None
    assert spec.loader is not None
    contract = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contract)
    contract.test_a_budget_above_the_length_is_exact(uniform, (6, 2, 16))
    contract.test_prompts_about_as_long_as_sinks_and_window(uniform, 3)
    whole = [
        test
        for name, test in vars(contract).items()
        if name.startswith("test_") and list(inspect.signature(test).parameters) == ["spec"]
    ]
    assert len(whole) >= 7
    for test in whole:
        test(uniform)


def test_the_contributed_policy_reads_its_budget(uniform: str) -> None:
    engine = tiny_engine.tiny_engine(policy=uniform, budget=20)
    sequence = tiny_engine.read(engine, tiny_engine.tokens(300))
    tiny_engine.decode(engine, sequence, tiny_engine.tokens(3, seed=1))
    geometry = engine.model_config.geometry
    assert sequence.far.rows_read == 3 * 20 * geometry.kv_heads * geometry.layers
