"""What a context will take, near and far, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nearfar.config import Budget, EngineConfig, format_bytes
from nearfar.errors import OutOfMemoryError
from nearfar.policies.base import Policy
from nearfar.runtime.far_store import BLOCK_TOKENS
from nearfar.runtime.hardware import available_memory_bytes
from nearfar.runtime.model_config import ModelConfig
from nearfar.runtime.prefill import PRODUCT_TOKENS
from nearfar.runtime.sequence import SPILL_TOKENS
from nearfar.storage import check_head_dim

FAR_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes for one context of ``context_tokens`` under one policy."""

    context_tokens: int
    weight_bytes: int
    near_kv_bytes: int
    prefill_bytes: int  # hidden states, one layer's keys and values, one chunk's activations
    far_bytes: int
    index_bytes: int

    @property
    def near_bytes(self) -> int:
        """All that must be in near memory at the worst moment."""
        return self.weight_bytes + self.near_kv_bytes + self.prefill_bytes

    @property
    def host_bytes(self) -> int:
        """All that must be in far memory: keys, values and index."""
        return self.far_bytes + self.index_bytes


def plan_memory(
    model: ModelConfig,
    config: EngineConfig,
    policy: Policy,
    dtype: torch.dtype,
    context_tokens: int,
) -> MemoryPlan:
    """Predict the bytes of one context."""
    geometry = model.geometry
    check_head_dim(getattr(torch, config.far_dtype), geometry.head_dim)
    token_values = geometry.kv_heads * 2 * geometry.head_dim  # of one layer
    kept = config.sinks + config.window
    if policy.traits.keeps_far:
        near_tokens = min(context_tokens, kept + SPILL_TOKENS)
        far_tokens = max(0, context_tokens - kept)
    else:
        budget = Budget(config.budget).keys(context_tokens)
        evicts = policy.traits.kind == "evicts"
        near_tokens = min(context_tokens, kept + budget) if evicts else context_tokens
        far_tokens = 0
    blocks = -(-far_tokens // BLOCK_TOKENS)
    far_token_bytes = token_values * FAR_ITEM_BYTES[config.far_dtype]
    return MemoryPlan(
        context_tokens,
        model.weight_bytes(dtype.itemsize),
        geometry.layers * near_tokens * token_values * dtype.itemsize,
        _prefill_bytes(model, config.chunk_tokens, context_tokens, dtype.itemsize),
        geometry.layers * blocks * BLOCK_TOKENS * far_token_bytes,
        policy.predict_index_bytes(geometry, far_tokens),
    )


def _prefill_bytes(model: ModelConfig, chunk_tokens: int, context_tokens: int, item: int) -> int:
    geometry = model.geometry
    hidden = context_tokens * model.hidden_size * item
    # keys and values, and once more the keys while the past is put before them
    layer = context_tokens * geometry.kv_heads * geometry.head_dim * 3 * item
    query = geometry.query_heads * geometry.head_dim
    # queries, two partial outputs in float32 and their merge
    attending = min(chunk_tokens, context_tokens) * query * (2 * item + 3 * 4)
    widest = 3 * model.intermediate_size + 4 * model.hidden_size
    product = min(PRODUCT_TOKENS, context_tokens) * widest * max(item, 4)
    return hidden + layer + max(attending, product)


def check_plan(plan: MemoryPlan, config: EngineConfig, device: torch.device) -> None:
    """Raise OutOfMemoryError, with what to change, if ``plan`` does not fit."""
    if device.type == "cuda":
        near_have = torch.cuda.mem_get_info(device)[0]
        host_need = plan.host_bytes
    else:
        near_have = available_memory_bytes()
        host_need = plan.host_bytes + plan.near_bytes
    near_cap = _capped(near_have, config.near_memory_bytes)
    far_cap = _capped(available_memory_bytes(), config.far_memory_bytes)
    near_remedy = "Raise --near-memory, choose a smaller model or --dtype, or give a shorter text."
    _require("near", plan.near_bytes, near_cap, _near_parts(plan), near_remedy)
    far_remedy = (
        "Raise --far-memory, choose a smaller --far-dtype or a policy that keeps less, or give a "
        "shorter text."
    )
    _require("far", plan.host_bytes, far_cap, _far_parts(plan), far_remedy)
    if device.type == "cpu":
        together = f"{_near_parts(plan)}, {_far_parts(plan)}"
        host_remedy = (
            "Choose a smaller model, --dtype or --far-dtype or a policy that keeps less, or give a "
            "shorter text."
        )
        _require("host", host_need, available_memory_bytes(), together, host_remedy)


def _capped(have_bytes: int, cap_bytes: int | None) -> int:
    return have_bytes if cap_bytes is None else min(have_bytes, cap_bytes)


def _near_parts(plan: MemoryPlan) -> str:
    return (
        f"weights {format_bytes(plan.weight_bytes)}, near keys and values "
        f"{format_bytes(plan.near_kv_bytes)}, reading the prompt {format_bytes(plan.prefill_bytes)}"
    )


def _far_parts(plan: MemoryPlan) -> str:
    return (
        f"far keys and values {format_bytes(plan.far_bytes)}, index "
        f"{format_bytes(plan.index_bytes)}"
    )


def _require(tier: str, need_bytes: int, have_bytes: int, parts: str, remedy: str) -> None:
    if need_bytes > have_bytes:
        raise OutOfMemoryError(
            f"Not enough {tier} memory: {format_bytes(need_bytes)} needed ({parts}), "
            f"{format_bytes(have_bytes)} there. {remedy}"
        )
