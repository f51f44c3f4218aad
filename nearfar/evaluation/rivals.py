"""transformers' own model over the same weights, to compare speed and numbers with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from nearfar.evaluation.synthetic import PowerLawKeys
from nearfar.runtime.decoder import Decoder
from nearfar.runtime.model_config import ModelConfig
from nearfar.runtime.weights import to_hugging_face


def twin_of(decoder: Decoder) -> Any:
    """A transformers model of the same family over ``decoder``'s weights, which it shares.

    Rotary embedding is the plain one whatever the model's: what differs is values, not work.
    """
    config, device = decoder.config, decoder.device
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(_config(config), dtype=decoder.dtype)
    state = {
        name: tensor.to(device) for name, tensor in to_hugging_face(decoder.weights, config).items()
    }
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    twin.load_state_dict(state, assign=True)
    twin.tie_weights()
    base = twin.model
    base.rotary_emb = type(base.rotary_emb)(twin.config).to(device)  # has buffers, no weights
    return twin.eval()


def _config(config: ModelConfig) -> Any:
    more: dict[str, Any] = {}
    if config.family == "smollm3":
        more["no_rope_layers"] = [int(uses) for uses in config.rope_layers]
    if config.family == "mistral":
        more["sliding_window"] = None
    if config.output_bias or config.mlp_bias:
        more |= {"attention_bias": config.output_bias, "mlp_bias": config.mlp_bias}
    found = AutoConfig.for_model(
        config.family,
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
        pad_token_id=None,
        **more,
    )
    found._attn_implementation = "sdpa"
    return found


class TransformersRun:
    """One model with one cache: decodes a token, or reads a prompt, when asked to."""

    def __init__(self, decoder: Decoder, *, offloaded: bool) -> None:
        self._decoder = decoder
        self._twin = twin_of(decoder)
        self._offloaded = offloaded
        self._cache: Any = None

    @torch.inference_mode()
    def fill(self, tokens: int, batch: int, seed: int = 0) -> None:
        """A cache of ``tokens`` random keys and values for each of ``batch`` sequences."""
        config, device, dtype = self._decoder.config, self._decoder.device, self._decoder.dtype
        shape = (config.kv_heads, tokens, config.head_dim)
        self._cache = self._new_cache()
        for layer in range(config.layers):
            source = PowerLawKeys(config.kv_heads, config.head_dim, dtype, device, seed + layer)
            keys = source.draw(tokens)
            values = torch.randn(shape, dtype=dtype, device=device)
            both = (part.expand(batch, *shape) for part in (keys, values))
            self._cache.update(*both, layer)

    @torch.inference_mode()
    def decode(self, token_ids: Tensor) -> Tensor:
        """Logits [B, V] after ``token_ids`` [B]."""
        out = self._twin(
            token_ids[:, None], past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    @torch.inference_mode()
    def read(self, token_ids: Tensor) -> Tensor:
        """Logits [V] after the prompt ``token_ids`` [T], its keys and values in a new cache."""
        self._cache = self._new_cache()
        out = self._twin(
            token_ids[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = out.logits[0, -1]
        return logits

    def forget(self) -> None:
        """Drop the cache."""
        self._cache = None

    def _new_cache(self) -> Any:
        return DynamicCache(config=self._twin.config, offloading=self._offloaded)
