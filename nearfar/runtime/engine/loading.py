"""Loading of weights: the memory check before it, the device, and the model's share of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch

from nearfar.config import EngineConfig, generator_seed
from nearfar.policies.registry import create_policy
from nearfar.runtime.engine.accounting import memory_errors
from nearfar.runtime.engine.gpu_share import take_share
from nearfar.runtime.engine.planning.memory_setup import MemorySetup
from nearfar.runtime.engine.planning.planner import require_memory
from nearfar.runtime.engine.prepared import Prepared
from nearfar.runtime.engine.workplace import Hands
from nearfar.runtime.memory.hardware import choose_device, choose_dtype, default_threads
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.models.weights import Weights, random_weights


def load_decoder(prepared: Prepared, config: EngineConfig, context_tokens: int) -> Decoder:
    """The model with its weights, loaded after a check that the context fits."""
    require_context(prepared.config, config, context_tokens)
    return _loaded(prepared.config, config, prepared.source.load_weights)


def random_decoder(plan: ModelPlan, config: EngineConfig, seed: int) -> Decoder:
    """A model with random weights."""
    return _loaded(plan, config, partial(random_weights, plan, seed=generator_seed(seed)))


def require_context(
    plan: ModelPlan,
    config: EngineConfig,
    context_tokens: int,
    sequences: int = 1,
    *,
    reads: bool = True,
) -> None:
    """Raise OutOfMemoryError, with the context that would fit, before weights are loaded."""
    device, dtype = _place(config)
    setup = MemorySetup(plan, config, create_policy(config.policy), dtype, device)
    require_memory(setup, context_tokens, sequences, reads=reads)


def _place(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    device, _ = choose_device(config.device)
    return device, choose_dtype(config.dtype, device)[0]


def _loaded(
    plan: ModelPlan, config: EngineConfig, load: Callable[[torch.dtype, torch.device], Weights]
) -> Decoder:
    device, dtype = _place(config)
    share = take_share(device, config.near_memory_bytes)
    try:
        with memory_errors():
            weights = Hands(config.threads or default_threads()).run(load, dtype, device)
        decoder = Decoder(plan, weights)
    except BaseException:
        share.release()
        raise
    weakref.finalize(decoder, share.release)
    return decoder
