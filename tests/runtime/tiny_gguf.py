"""Tiny models with random weights, as a GGUF file and as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

from nearfar.runtime.checkpoints.model_config import parse_config
from nearfar.runtime.models.weights import assemble

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ"]
VOCABULARY = [*CONTROL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 777,
}


def tiny_config(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """The content of a config.json."""
    return {
        "model_type": architecture,
        **SIZES,
        "vocab_size": len(VOCABULARY),
        "rms_norm_eps": 2.0**-17,
        "rope_theta": 50_000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    } | changes


def tiny_state(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors with the names and shapes that the config asks for."""
    generator, state = torch.Generator().manual_seed(seed), {}
    parsed = parse_config(config, "test")
    names: list[str] = []

    def shapes(name: str) -> Tensor:
        names.append(name)
        return _of_shape(name, config)

    assemble(shapes, parsed, torch.float32, torch.device("meta"))
    for name in names:
        shape = _of_shape(name, config).shape
        state[name] = torch.randn(shape, generator=generator)
    return state


def _of_shape(name: str, config: dict[str, Any]) -> Tensor:
    hidden, inter, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    rows = {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inter, hidden),
        "up_proj": (inter, hidden),
        "down_proj": (hidden, inter),
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "q_norm": (dim,),
        "k_norm": (dim,),
    }
    shape = rows.get(name.split(".")[-2], (hidden,))
    return torch.empty(shape[:1] if name.endswith(".bias") else shape, device="meta")


def write_folder(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    """The model in the Hugging Face layout, without a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def _interleaved(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of q or k in the order in which llama.cpp keeps them."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def write_gguf(
    path: Path,
    config: dict[str, Any],
    state: dict[str, Tensor],
    quantised: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    leave_out: str = "",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, NDArray[np.float32]] | None = None,
) -> Path:
    """The model as GGUF; ``leave_out`` is a metadata key or a tensor that is not written.

    ``metadata`` (under the architecture's name, unless they have a dot-free first part of their
    own) and ``tensors`` are added as they are. Matrices are ``quantised``.
    """
    name = config["model_type"]
    writer = gguf.GGUFWriter(path, name)
    values: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    } | (metadata or {})
    for key, value in values.items():
        if key == leave_out:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        full = key if key.startswith(("tokenizer.", "split.")) else f"{name}.{key}"
        add[type(value)](full, value)
    _add_tokenizer(writer, "tokenizer.ggml.pre" in values)
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[name],
        SIZES["num_hidden_layers"],
    )
    for hf_name, tensor in state.items():
        own_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if own_name == leave_out:
            continue
        array = tensor.numpy()
        if name in ("llama", "smollm3") and (".q_proj." in hf_name or ".k_proj." in hf_name):
            array = _interleaved(array, config["head_dim"])
        kind = quantised if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(own_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    for own_name, extra in (tensors or {}).items():
        writer.add_tensor(own_name, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, has_rule: bool) -> None:
    writer.add_tokenizer_model("gpt2")
    if not has_rule:
        writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_merges(MERGES)
    kinds = [gguf.TokenType.CONTROL] * len(CONTROL)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
