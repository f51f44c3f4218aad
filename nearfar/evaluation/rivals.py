"""transformers' own model over the same weights, to compare speed and numbers with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from nearfar.evaluation.synthetic import PowerLawKeys
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.models.weights import to_hugging_face


def twin_of(decoder: Decoder) -> Any:
    """A transformers model of the same family over ``decoder``'s weights, which it shares.

    Rotary embedding is always the plain one: values may differ from the model's, work does not.
    """
    config, device = decoder.plan, decoder.device
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


def _config(plan: ModelPlan) -> Any:
    attention, first = plan.attention, plan.layers[0].feed_forward
    assert first is not None
    more: dict[str, Any] = {}
    if plan.family == "smollm3":
        rotated = (layer.mixer is not None and layer.mixer.rope for layer in plan.layers)
        more["no_rope_layers"] = [int(rope is not None) for rope in rotated]
    if plan.family == "mistral":
        more["sliding_window"] = None
    if attention.output_bias or first.bias:
        more |= {"attention_bias": attention.output_bias, "mlp_bias": first.bias}
    found = AutoConfig.for_model(
        plan.family,
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        intermediate_size=first.inner_size,
        num_hidden_layers=len(plan.layers),
        num_attention_heads=attention.query_heads,
        num_key_value_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        rms_norm_eps=plan.norm_eps,
        max_position_embeddings=plan.max_context_tokens,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0 if plan.rope is None else plan.rope.base,
        },
        tie_word_embeddings=plan.tied_embeddings,
        pad_token_id=None,
        **more,
    )
    found._attn_implementation = "sdpa"
    return found


class TransformersRun:
    """One model with one cache, which decodes a token or reads a prompt."""

    def __init__(self, decoder: Decoder, *, offloaded: bool) -> None:
        self._decoder = decoder
        self._twin = twin_of(decoder)
        self._offloaded = offloaded
        self._cache: Any = None

    @torch.inference_mode()
    def fill(self, tokens: int, batch: int, seed: int = 0) -> None:
        """A cache of ``tokens`` random keys and values for each of ``batch`` sequences."""
        geometry, device = self._decoder.plan.geometry, self._decoder.device
        dtype, shape = self._decoder.dtype, (geometry.kv_heads, tokens, geometry.head_dim)
        self._cache = self._new_cache()
        for layer in range(geometry.layers):
            source = PowerLawKeys(geometry.kv_heads, geometry.head_dim, dtype, device, seed + layer)
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
