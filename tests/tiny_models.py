"""Tiny random models of every family, made and saved by transformers, the reference.

Sizes are odd on purpose: three query heads per KV head, no power of two, head dims that are not
hidden / heads. All weights are drawn anew, so that norms and biases are not the ones and zeros that
a model starts with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


_LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)

# name: (model type, changes to the sizes above)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama3": ("llama", {"head_dim": 16, **_LLAMA3}),
    "llama-linear": ("llama", _rope("linear", factor=2.5)),
    "llama-yarn": ("llama", {"head_dim": 22, **_YARN}),
    "mistral": ("mistral", {"head_dim": 14, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 18}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
}


def build(name: str, folder: Path, **changes: Any) -> Any:
    """The model ``name`` of MODELS with ``changes`` to its config: saved to ``folder``, returned.

    It is a transformers model in float32 with eager attention; the same call gives the same model.
    """
    model_type, own = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **{**_SIZES, **own, **changes})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return model


def reference_logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] float32 that transformers computes for ``token_ids`` [T]."""
    with torch.no_grad():
        logits: torch.Tensor = model(token_ids[None]).logits[0].float()
    return logits
