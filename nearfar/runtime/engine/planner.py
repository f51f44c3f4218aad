"""What a context will take, near and far, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nearfar.config import GIB, EngineConfig, format_bytes
from nearfar.errors import OutOfMemoryError
from nearfar.policies.base import Policy
from nearfar.policies.registry import create_policy
from nearfar.runtime.memory.far_state import SPILL_TOKENS
from nearfar.runtime.memory.far_store import BLOCK_TOKENS
from nearfar.runtime.memory.hardware import available_memory_bytes
from nearfar.runtime.memory.sequence_settings import budget_of, near_limit
from nearfar.runtime.models.linear import product_tokens
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.steps.prefill import chunk_tokens_of
from nearfar.storage import FORMATS, check_head_dim, group_tokens, token_bytes

# what CUDA takes for itself: its context, loaded kernels, graphs; 0.83 GiB were seen
CONTEXT_BYTES = GIB
ROWS_ON_THEIR_WAY = 2  # layers of keys and values: one is copied away while the next is made


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes for ``sequences`` contexts of ``context_tokens`` under one policy."""

    context_tokens: int
    weight_bytes: int
    near_kv_bytes: int
    prefill_bytes: int  # hidden states, one layer's keys and values, one chunk's activations
    far_bytes: int
    index_bytes: int  # on the host
    near_index_bytes: int = 0  # an index on a GPU, and what selecting from it works in
    context_bytes: int = 0  # of CUDA itself
    host_weight_bytes: int = 0  # of which a token reads a row: not on the GPU

    @property
    def near_bytes(self) -> int:
        """All that must be in near memory at the worst moment."""
        held = self.weight_bytes + self.near_kv_bytes + self.near_index_bytes
        return held + self.prefill_bytes + self.context_bytes

    @property
    def host_bytes(self) -> int:
        """All that must be in far memory: keys, values and index."""
        return self.far_bytes + self.index_bytes


def plan_memory(
    model: ModelPlan,
    config: EngineConfig,
    policy: Policy,
    dtype: torch.dtype,
    context_tokens: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008  never changed
    sequences: int = 1,
) -> MemoryPlan:
    """Predict the bytes of ``sequences`` contexts, read one after another, decoded together.

    Raises InvalidOptionError for a policy that cannot serve the model.
    """
    policy.check_model(model.geometry)
    geometry, item, on_gpu = model.geometry, dtype.itemsize, device.type == "cuda"
    far_dtype = FORMATS[config.far_dtype]
    check_head_dim(far_dtype, geometry.head_dim)
    budget = budget_of(config, geometry, policy.traits, item)  # one too small is seen here
    token_values = geometry.kv_heads * 2 * geometry.head_dim  # of one layer
    kept = config.sinks + config.window
    if policy.traits.keeps_far:
        near_tokens = min(context_tokens, kept + SPILL_TOKENS)
        far_tokens = max(0, context_tokens - kept)
        far_tokens -= far_tokens % group_tokens(far_dtype)
    else:
        near_tokens, far_tokens = context_tokens, 0
        if policy.traits.kind == "evicts":
            near_tokens = min(context_tokens, near_limit(budget, kept, context_tokens))
    blocks = -(-far_tokens // BLOCK_TOKENS)
    far_token_bytes = geometry.kv_heads * token_bytes(far_dtype, geometry.head_dim)
    near_index = on_gpu and policy.selects_near
    host_weights = 0
    if on_gpu and not model.tied_embeddings:
        host_weights = model.vocab_size * model.hidden_size * item
    return MemoryPlan(
        context_tokens,
        model.weight_bytes(item) - host_weights,
        sequences
        * (
            geometry.layers * near_tokens * token_values * item
            + policy.predict_evicted_summary_bytes(geometry)
        ),
        _prefill_bytes(
            model, chunk_tokens_of(config.chunk_tokens, device), context_tokens, item, device
        ),
        sequences * geometry.layers * blocks * BLOCK_TOKENS * far_token_bytes,
        0 if near_index else sequences * policy.predict_index_bytes(geometry, far_tokens),
        sequences * policy.predict_near_index_bytes(geometry, far_tokens) if near_index else 0,
        CONTEXT_BYTES if on_gpu else 0,
        host_weights,
    )


def _prefill_bytes(
    model: ModelPlan, chunk_tokens: int, context_tokens: int, item: int, device: torch.device
) -> int:
    geometry, on_gpu = model.geometry, device.type == "cuda"
    hidden = context_tokens * model.hidden_size * item
    token = geometry.kv_heads * geometry.head_dim * item
    # keys and values; on a GPU also those of the layer before, on a CPU more keys where unrotated
    layer = context_tokens * token * (2 * ROWS_ON_THEIR_WAY if on_gpu else 3)
    query = geometry.query_heads * geometry.head_dim
    # queries, two partial outputs in float32 and their merge
    attending = min(chunk_tokens, context_tokens) * query * (2 * item + 3 * 4)
    widest = 3 * model.widest_inner_size + 4 * model.hidden_size
    product = min(product_tokens(device), context_tokens) * widest * max(item, 2 if on_gpu else 4)
    return hidden + layer + max(attending, product)


def check_plan(
    plan: MemoryPlan,
    config: EngineConfig,
    device: torch.device,
    planned: Callable[[int], MemoryPlan] | None = None,
) -> None:
    """Raise OutOfMemoryError, with what to change, if ``plan`` does not fit.

    With ``planned``, which plans any number of tokens, the error says how many would fit.
    """
    have = _free(device)
    lack = _lack(plan, config, device, have)
    if lack is None:
        return
    if planned is not None:
        fitting = _largest(lambda tokens: _lack(planned(tokens), config, device, have), plan)
        lack += f" At most {fitting:,} tokens would fit." if fitting else " Not one token would."
    raise OutOfMemoryError(lack)


def require_memory(
    model: ModelPlan,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    context_tokens: int,
    sequences: int = 1,
    *,
    reads: bool = True,
) -> None:
    """Raise OutOfMemoryError, saying what would fit, before anything is loaded."""
    policy = create_policy(config.policy)

    def planned(tokens: int) -> MemoryPlan:
        plan = plan_memory(model, config, policy, dtype, tokens, device, sequences)
        return plan if reads else replace(plan, prefill_bytes=0)

    check_plan(planned(context_tokens), config, device, planned)


def plan_asking(
    plan: MemoryPlan, model: ModelPlan, dtype: torch.dtype, mapped_bytes: int
) -> MemoryPlan:
    """``plan`` where all but a question was read, and ``mapped_bytes`` of it are in a file."""
    hidden = plan.context_tokens * model.hidden_size * dtype.itemsize
    far_bytes = max(0, plan.far_bytes - mapped_bytes)
    return replace(plan, prefill_bytes=plan.prefill_bytes - hidden, far_bytes=far_bytes)


def _largest(lack: Callable[[int], str | None], plan: MemoryPlan) -> int:
    """Most tokens that lack nothing, fewer than those of ``plan``; 0 if none."""
    fits, fails = 0, plan.context_tokens
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if lack(middle) is None:
            fits = middle
        else:
            fails = middle
    return fits


def _free(device: torch.device) -> tuple[int, int]:
    """Bytes free where near is, and on the host."""
    host = available_memory_bytes()
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host), host


def _lack(
    plan: MemoryPlan, config: EngineConfig, device: torch.device, have: tuple[int, int]
) -> str | None:
    """What ``plan`` needs and there is not, in words; None: it fits."""
    near_have, host_have = have
    near_remedy = "Raise --near-memory, choose a smaller model or --dtype, or give a shorter text."
    far_remedy = (
        "Raise --far-memory, choose a smaller --far-dtype or a policy that keeps less, or give a "
        "shorter text."
    )
    host_remedy = (
        "Choose a smaller model, --dtype or --far-dtype or a policy that keeps less, or give a "
        "shorter text."
    )
    near_cap = _capped(near_have, config.near_memory_bytes)
    far_cap = _capped(host_have, config.far_memory_bytes)
    checks = [
        ("near", plan.near_bytes, near_cap, _near_parts(plan), near_remedy),
        ("far", plan.host_bytes, far_cap, _far_parts(plan), far_remedy),
    ]
    if device.type == "cpu":
        together = f"{_near_parts(plan)}, {_far_parts(plan)}"
        both = plan.host_bytes + plan.near_bytes
        checks.append(("host", both, host_have, together, host_remedy))
    return next((text for check in checks if (text := _missing(*check))), None)


def _capped(have_bytes: int, cap_bytes: int | None) -> int:
    return have_bytes if cap_bytes is None else min(have_bytes, cap_bytes)


def _near_parts(plan: MemoryPlan) -> str:
    parts = {
        "weights": plan.weight_bytes,
        "near keys and values": plan.near_kv_bytes,
        "near index": plan.near_index_bytes,
        "reading the prompt": plan.prefill_bytes,
        "CUDA": plan.context_bytes,
    }
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)


def _far_parts(plan: MemoryPlan) -> str:
    return (
        f"far keys and values {format_bytes(plan.far_bytes)}, index "
        f"{format_bytes(plan.index_bytes)}"
    )


def _missing(tier: str, need_bytes: int, have_bytes: int, parts: str, remedy: str) -> str | None:
    if need_bytes <= have_bytes:
        return None
    return (
        f"Not enough {tier} memory: {format_bytes(need_bytes)} needed ({parts}), "
        f"{format_bytes(have_bytes)} there. {remedy}"
    )
