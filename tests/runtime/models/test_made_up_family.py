"""A family is one file and one line: here one that is made up, with names of its own."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folder import make_folder, text_of

from nearfar import named
from nearfar.config import EngineConfig, SamplingConfig
from nearfar.errors import InvalidOptionError, UnsupportedModelError
from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.models.families import registry
from nearfar.runtime.models.families.base import (
    Family,
    TensorNames,
    attention_plan,
    dense_plan,
    equal_layers,
    model_plan,
)

SETTINGS: Any = {"policy": "full", "device": "cpu", "threads": 1, "dtype": "float32"}


class MadeUp(Family):
    """Llama's layers, stored fused and under other names."""

    examples = "none"
    names = TensorNames(
        input_norm="norms.first",
        qkv=("mixer.in",),
        output="mixer.out",
        post_norm="norms.second",
        gate_up=("ffn.in",),
        down="ffn.out",
        layer="blocks.{}.",
        embedding="words",
        norm="last_norm",
    )

    def plan(self, fields: Any, family: str) -> Any:
        layers = equal_layers(fields, attention_plan(fields), dense_plan(fields))
        return model_plan(fields, family, layers, tied=True)


def renamed(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A Llama's tensors as the made-up family stores them."""
    found = {
        "words.weight": state["model.embed_tokens.weight"],
        "last_norm.weight": state["model.norm.weight"],
    }
    for i in range(layers):
        old, new = f"model.layers.{i}.", f"blocks.{i}."
        qkv = [state[f"{old}self_attn.{name}_proj.weight"] for name in "qkv"]
        gate_up = [state[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        found |= {
            f"{new}mixer.in.weight": torch.cat(qkv),
            f"{new}mixer.out.weight": state[f"{old}self_attn.o_proj.weight"],
            f"{new}ffn.in.weight": torch.cat(gate_up),
            f"{new}ffn.out.weight": state[f"{old}mlp.down_proj.weight"],
            f"{new}norms.first.weight": state[f"{old}input_layernorm.weight"],
            f"{new}norms.second.weight": state[f"{old}post_attention_layernorm.weight"],
        }
    return found


def test_one_file_and_one_line_add_a_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path, tie_word_embeddings=True)
    answers = [answer(tmp_path)]
    config = json.loads((tmp_path / "config.json").read_text())
    state = renamed(load_file(tmp_path / "model.safetensors"), config["num_hidden_layers"])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    changed = config | {"model_type": "made-up"}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UnsupportedModelError, match=r"'made-up', which is not.*qwen3 \(Qwen3\)"):
        answer(tmp_path)
    monkeypatch.setitem(registry.BUILT_IN, "made-up", f"{__name__}:MadeUp")
    answers.append(answer(tmp_path))
    assert answers[0] == answers[1]


def answer(folder: Path) -> tuple[int, ...]:
    engine = Engine.from_pretrained(str(folder), EngineConfig(**SETTINGS))
    return tuple(engine.generate(text_of(30), SamplingConfig(max_new_tokens=5)).token_ids)


def test_other_packages_register_families(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("made-up", f"{__name__}:MadeUp", "nearfar.families")]
    monkeypatch.setattr(named, "entry_points", lambda group: entries if "famil" in group else [])
    assert registry.family_names()[-1] == "made-up"
    assert isinstance(registry.family_named("made-up"), MadeUp)
    entries.append(EntryPoint("llama", "elsewhere:Llama", "nearfar.families"))
    with pytest.raises(InvalidOptionError, match=r"Two families .* registered as 'llama'"):
        registry.family_names()


def test_every_family_says_what_its_files_are_called() -> None:
    architectures = [
        family.gguf.architecture
        for family in map(registry.family_named, registry.BUILT_IN)
        if family.gguf is not None
    ]
    assert architectures == ["llama", "qwen2", "qwen3", "smollm3"]
    assert list(registry.gguf_families()) == architectures


def test_a_config_without_a_type_names_what_is_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*llama \(Llama 2 and 3, SmolLM2\)"):
        parse_config({"model_type": "gpt2"}, "config.json")
