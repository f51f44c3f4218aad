"""Attention of a real model over keys and values rounded to a few bits, the keys in two ways.

By channel: 32 tokens share a step and a zero in each channel of keys, as in KIVI (Liu et al., arXiv
2402.02750). By token: 32 channels of each token share them. Values are rounded by token in both
cases, so that all else, including the bits, is equal.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean

import torch

from nearfar.cpu_kernels.attend import attend_all
from nearfar.packing import GROUP, quantise, restore
from nearfar.progress import silent
from nearfar.records import FarView
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.steps.decode import Attended, decode_step

BITS = (2, 4)
SHARED = {"channel": -2, "token": -1}  # the dimension of a group that shares a step


def rounded(rows: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """``rows`` [Hkv, N, D] after rounding; N is a multiple of the group size.

    A step and a zero for a channel of 32 tokens (``dim`` -2), or for 32 channels of a token (-1).
    """
    Hkv, N, D = rows.shape
    shape = (Hkv, N // GROUP, GROUP, D) if dim == -2 else (Hkv, N, D // GROUP, GROUP)
    return restore(*quantise(rows.reshape(shape), bits, dim)).reshape(rows.shape)


def rounding_errors(
    engine: Engine, read: list[int], following: list[int]
) -> dict[tuple[int, str], float]:
    """Error of attention by bits and by the way of rounding keys; sinks and window are exact."""
    sequence, config = engine.new_sequence(), engine.config
    engine.read_ids(sequence, read, silent)
    stop = config.sinks + (len(read) - config.sinks - config.window) // GROUP * GROUP
    errors: dict[tuple[int, str], list[float]] = defaultdict(list)

    def observe(attended: Attended) -> torch.Tensor:
        near, out = attended.sequence.near[attended.layer], attended.partial.out
        keys, values = near.keys.float(), near.values.float()
        far = slice(config.sinks, stop)
        for bits in BITS:
            for shared, dim in SHARED.items():
                k, v = keys.clone(), values.clone()
                k[:, far], v[:, far] = rounded(k[:, far], bits, dim), rounded(v[:, far], bits, -1)
                got = attend_all(attended.query, FarView(torch.cat([k, v], -1), k.shape[1])).out
                error = (got - out).norm(dim=-1) / out.norm(dim=-1)
                errors[bits, shared].append(float(error.mean()))
        return out

    for token in following:
        decode_step(engine.decoder, [sequence], torch.tensor([token]), observe)
    sequence.close()
    return {key: fmean(each) for key, each in errors.items()}
