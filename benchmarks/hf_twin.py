"""transformers' own model over our weights, to compare with and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nearfar.runtime.model_config import ModelConfig
from nearfar.runtime.weights import DecoderWeights


def hugging_face_twin(config: ModelConfig, weights: DecoderWeights) -> Any:
    """A LlamaForCausalLM with the same weights in the same type, sharing no memory."""
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.query_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_context_tokens,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.base},
            tie_word_embeddings=config.tied_embeddings,
            attn_implementation="sdpa",
        )
    ).to(weights.embedding.dtype)
    query, key = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    state["lm_head.weight"] = weights.head
    for i, layer in enumerate(weights.layers):
        q, k, v = torch.split(layer.qkv, [query, key, key])
        gate, up = layer.gate_up.chunk(2)
        parts: dict[str, torch.Tensor] = {
            "input_layernorm": layer.input_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.output,
            "post_attention_layernorm": layer.post_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
        }
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in parts.items()}
    twin.load_state_dict(state)
    return twin.eval()
