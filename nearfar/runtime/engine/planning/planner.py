"""Checks whether a planned context fits near and far memory, and says what to change if not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from nearfar.config import EngineConfig, format_bytes
from nearfar.errors import OutOfMemoryError
from nearfar.runtime.engine.planning.memory_plan import MemoryPlan, plan_memory
from nearfar.runtime.engine.planning.memory_setup import MemorySetup
from nearfar.runtime.memory.hardware import available_memory_bytes


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
    setup: MemorySetup, context_tokens: int, sequences: int = 1, *, reads: bool = True
) -> None:
    """Raise OutOfMemoryError, with the context that would fit, before weights are loaded.

    Without ``reads``, contexts are generated and not prefilled.
    """

    def planned(tokens: int) -> MemoryPlan:
        plan = plan_memory(setup, tokens, sequences)
        made = {"prefill_bytes": 0, "asking_bytes": 0, "index_work_bytes": 0}
        return plan if reads else replace(plan, **made)

    check_plan(planned(context_tokens), setup.config, setup.device, planned)


def _largest(lack: Callable[[int], str | None], plan: MemoryPlan) -> int:
    """The most tokens, fewer than those of ``plan``, that fit; 0 if none."""
    fits, fails = 0, plan.context_tokens
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if lack(middle) is None:
            fits = middle
        else:
            fails = middle
    return fits


def _free(device: torch.device) -> tuple[int, int]:
    """Free bytes of near memory and of the host."""
    host = available_memory_bytes()
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host), host


def _lack(
    plan: MemoryPlan, config: EngineConfig, device: torch.device, have: tuple[int, int]
) -> str | None:
    """The memory that ``plan`` lacks, in words; None if it fits."""
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
        ("near", plan.near_bytes, near_cap, plan.near_parts(), near_remedy),
        ("far", plan.host_bytes, far_cap, plan.far_parts(), far_remedy),
    ]
    if device.type == "cpu":
        together = f"{plan.near_parts()}, {plan.far_parts()}"
        both = plan.host_bytes + plan.near_bytes
        checks.append(("host", both, host_have, together, host_remedy))
    return next((text for check in checks if (text := _missing(*check))), None)


def _capped(have_bytes: int, cap_bytes: int | None) -> int:
    return have_bytes if cap_bytes is None else min(have_bytes, cap_bytes)


def _missing(tier: str, need_bytes: int, have_bytes: int, parts: str, remedy: str) -> str | None:
    if need_bytes <= have_bytes:
        return None
    return (
        f"Not enough {tier} memory: {format_bytes(need_bytes)} needed ({parts}), "
        f"{format_bytes(have_bytes)} there. {remedy}"
    )
