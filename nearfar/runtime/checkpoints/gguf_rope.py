"""The rotary scaling of a GGUF, as the `rope_scaling` of a config.json.

Read as llama.cpp does: a factor without a type is linear, `rope.scale_linear` is the factor's old
name, and Llama 3's scaling is kept as its result, a divisor for every frequency.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nearfar.errors import UnsupportedModelError
from nearfar.runtime.models.rope import RopeConfig, inverse_frequencies

_LLAMA3_TRAINED_TOKENS = 8192
Unsupported = Callable[[str, str], UnsupportedModelError]


def rope_scaling(
    value: Callable[[str], Any], divisors: Tensor | None, unsupported: Unsupported
) -> dict[str, Any] | None:
    """The rope_scaling of a config.json; None where nothing is scaled.

    ``value`` gives the metadata of a key after `rope.`, None where there is none. ``divisors``
    [D / 2] float32 are those of the tensor rope_freqs.
    """
    kind = value("scaling.type") or "linear"
    factor = value("scaling.factor")
    factor = value("scale_linear") if factor is None else factor
    if kind not in ("none", "linear", "yarn"):
        raise unsupported(f"rotary scaling {kind!r}", "none, linear, yarn, Llama 3's")
    scaled = kind != "none" and factor not in (None, 0, 1)
    if divisors is not None:
        if scaled or kind == "yarn":
            raise unsupported(f"rotary scaling {kind!r} and frequency divisors at once", "one")
        return _llama3(divisors, float(value("freq_base") or 10_000.0), unsupported)
    if kind == "yarn":
        keys = {
            "original_max_position_embeddings": "scaling.original_context_length",
            "beta_fast": "scaling.yarn_beta_fast",
            "beta_slow": "scaling.yarn_beta_slow",
        }
        own = {key: value(name) for key, name in keys.items()}
        return {"rope_type": "yarn", "factor": factor, **own}
    return {"rope_type": "linear", "factor": factor} if scaled else None


def _llama3(divisors: Tensor, base: float, unsupported: Unsupported) -> dict[str, Any]:
    """Llama 3's scaling, found from the divisors that it gives.

    All published models have one set of constants and a factor, which is the largest divisor.
    The frequencies that follow are compared with the file's, and others are refused.
    """
    factor = round(float(divisors.max()), 3)
    rope = RopeConfig(base, "llama3", factor, _LLAMA3_TRAINED_TOKENS)
    plain = inverse_frequencies(RopeConfig(base), 2 * len(divisors))
    expected = inverse_frequencies(rope, 2 * len(divisors))
    if not torch.allclose(plain / divisors, expected, rtol=1e-3, atol=0):
        raise unsupported("frequency divisors of its own (rope_freqs)", "Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.trained_context_tokens,
    }
