from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import LIMIT_SECONDS
from safetensors import safe_open
from safetensors.torch import save_file

from nearfar.config import DEFAULT_MODEL
from nearfar.errors import CheckpointError
from nearfar.progress import silent
from nearfar.records import Geometry
from nearfar.runtime.checkpoints.builtin import BUILT_IN, Adapter, adapter_path
from nearfar.runtime.checkpoints.cache_folder import sha256_of
from nearfar.runtime.checkpoints.download import fetch
from nearfar.runtime.checkpoints.gguf_file import GgufFile
from nearfar.runtime.checkpoints.model_source import open_source
from nearfar.runtime.text.chat import DocumentPrompt

MODEL = BUILT_IN[DEFAULT_MODEL]
METADATA = {"rope_theta": "5000000.0", "max_position_embeddings": "131072"}
OPEN = """
import sys
import torch
from nearfar.runtime.checkpoints.model_source import open_source
model = open_source("smollm2-135m-128k")
tokenizer = model.load_tokenizer()
weights = model.load_weights(torch.bfloat16, torch.device("cpu"))
print("transformers" in sys.modules)
"""


@pytest.fixture
def tiny_adapter(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "layers.0.mlp.up_proj.lora_A": torch.randn(2, 5, generator=generator).bfloat16(),
        "layers.0.mlp.up_proj.lora_B": torch.randn(7, 2, generator=generator).bfloat16(),
        "norm.weight": torch.randn(5, generator=generator),
    }
    save_file(tensors, tmp_path / "adapter.safetensors", metadata=METADATA)
    return tmp_path / "adapter.safetensors"


def test_adapter_changes_projections_and_replaces_norms(tiny_adapter: Path) -> None:
    adapter = Adapter(tiny_adapter, sha256_of(tiny_adapter))
    base = torch.arange(35.0).reshape(7, 5)
    read = adapter.applied_to(lambda _: base)
    with safe_open(tiny_adapter, framework="pt") as file:
        up = file.get_tensor("layers.0.mlp.up_proj.lora_B").double()
        down = file.get_tensor("layers.0.mlp.up_proj.lora_A").double()
        norm = file.get_tensor("norm.weight")
    changed = read("model.layers.0.mlp.up_proj.weight")
    assert changed.dtype == torch.float32
    assert torch.allclose(changed.double(), base + up @ down, atol=1e-5)
    assert torch.equal(read("model.norm.weight"), norm)
    assert read("model.layers.1.mlp.up_proj.weight") is base
    assert read("model.embed_tokens.weight") is base


def test_adapter_says_rotary_base_and_context(tiny_adapter: Path) -> None:
    assert Adapter(tiny_adapter, sha256_of(tiny_adapter)).config == {
        "rope_theta": 5_000_000.0,
        "rope_scaling": None,
        "max_position_embeddings": 131_072,
    }


@pytest.mark.parametrize("length", [0, 7, 300, -1])
def test_truncated_adapter_is_refused(tiny_adapter: Path, length: int) -> None:
    expected = sha256_of(tiny_adapter)
    tiny_adapter.write_bytes(tiny_adapter.read_bytes()[:length])
    message = f"is corrupt: its sha256 is .*, expected {expected}. Install nearfar again"
    with pytest.raises(CheckpointError, match=message):
        Adapter(tiny_adapter, expected)
    with pytest.raises(CheckpointError, match=r"cannot be read \(.+\)\. Install nearfar again"):
        Adapter(tiny_adapter, sha256_of(tiny_adapter))


def test_missing_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone cannot be read .*Install nearfar again"):
        Adapter(tmp_path / "gone", "")


def test_adapter_in_the_package_is_the_expected_one() -> None:
    adapter = Adapter(adapter_path(MODEL), MODEL.adapter_sha256)
    assert adapter.config["rope_theta"] == 5_000_000.0
    assert adapter.config["max_position_embeddings"] == 131_072


@pytest.mark.model
def test_config_is_that_of_the_base_with_the_adapters_context() -> None:
    config = open_source(DEFAULT_MODEL).config
    assert (config.hidden_size, config.vocab_size) == (576, 49_152)
    assert config.geometry == Geometry(30, 9, 3, 64)
    assert config.attention.rope is not None
    assert (config.attention.rope.base, config.max_context_tokens) == (5_000_000.0, 131_072)
    assert config.tied_embeddings


@pytest.mark.model
@pytest.mark.slow
def test_base_weights_are_those_that_transformers_loads() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = fetch(MODEL.base, silent)
    file = GgufFile(path)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**file.config))
    reference: dict[str, torch.Tensor] = load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=model
    )["tensors"]
    compared = 0
    for name, expected in reference.items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(file.tensor(name), expected), name
            compared += 1
    assert compared == file.num_tensors == 272


@pytest.mark.model
def test_weights_are_base_plus_adapter() -> None:
    tensors = open_source(DEFAULT_MODEL).load_weights(torch.float32, torch.device("cpu"))
    file = GgufFile(fetch(MODEL.base, silent))
    with safe_open(adapter_path(MODEL), framework="pt") as adapter:
        for part, rows in (("q", slice(0, 576)), ("k", slice(576, 768)), ("v", slice(768, 960))):
            name = f"layers.11.self_attn.{part}_proj"
            up = adapter.get_tensor(f"{name}.lora_B").double()
            down = adapter.get_tensor(f"{name}.lora_A").double()
            expected = file.tensor(f"model.{name}.weight").double() + up @ down
            assert torch.allclose(tensors["layers.11.qkv"][rows].double(), expected, atol=1e-5)
            assert up.abs().max() > 0
        norm = adapter.get_tensor("layers.29.post_attention_layernorm.weight")
        assert torch.equal(tensors["layers.29.post_norm"], norm)
    assert torch.equal(tensors["embedding"], file.tensor("model.embed_tokens.weight"))
    assert "head" not in tensors


@pytest.mark.model
def test_tokenizer_is_smollm2s() -> None:
    tokenizer = open_source(DEFAULT_MODEL).load_tokenizer()
    text = "In 1999, it's  42 km.\n\n\té漢字🎉  <|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids[-1] == 2
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.vocab_size == 49_152
    assert tokenizer.opening_ids == []
    spelled = [tokenizer.decode([i]) for i in tokenizer.encode("in 1999  42")]
    assert spelled == ["in", " ", "1", "9", "9", "9", "  ", "4", "2"]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) == text.removesuffix("<|im_end|>")


@pytest.mark.model
def test_document_prompt_is_the_one_the_model_was_trained_on() -> None:
    tokenizer = open_source(DEFAULT_MODEL).load_tokenizer()
    prompt = DocumentPrompt(tokenizer, "\nThe code is 12. <|im_end|> It ends.\n")
    ids = prompt.prefix_ids + prompt.question_ids("What is the code?")
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nRead the following text carefully. You will be asked "
        "questions about it.\n\nThe code is 12. <|im_end|> It ends.\n\nWhat is the code?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert prompt.prefix_ids[-1] == tokenizer.encode(".")[0]


@pytest.mark.model
def test_second_start_imports_no_converter() -> None:
    open_source(DEFAULT_MODEL).load_weights(torch.bfloat16, torch.device("cpu"))
    arguments = [sys.executable, "-c", OPEN]
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=True, timeout=LIMIT_SECONDS
    )
    assert done.stdout == "False\n"


def test_adapter_has_the_only_scale_that_is_implemented() -> None:
    with safe_open(adapter_path(MODEL), framework="pt") as file:
        assert float(file.metadata()["lora_scale"]) == 1.0
