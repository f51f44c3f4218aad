"""The attention kernels in plain NumPy and float64, with the same signatures."""

from __future__ import annotations

import numpy as np
import torch

from nearfar.records import FarView, Partial, Selection


def attend_selected(query: torch.Tensor, far: FarView, selection: Selection) -> Partial:
    """Attention of ``query`` [Hq, D] float32 (scaled) over the selected far rows."""
    q = query.double().numpy()
    keys = far.keys().double().numpy()
    values = far.values().double().numpy()
    out = np.zeros(q.shape)
    lse = np.full(q.shape[0], -np.inf)
    group = q.shape[0] // keys.shape[0]
    for head in range(q.shape[0]):
        row = head // selection.heads_per_row
        span = slice(selection.offsets[row], selection.offsets[row + 1])
        chosen = selection.indices[span]
        if len(chosen) == 0:
            continue
        logits = keys[head // group, chosen] @ q[head] + selection.log_weights[span]
        top = logits.max()
        weights = np.exp(logits - top)
        lse[head] = top + np.log(weights.sum())
        out[head] = weights @ values[head // group, chosen] / weights.sum()
    return Partial(torch.from_numpy(out), torch.from_numpy(lse))


def attend_all(query: torch.Tensor, far: FarView) -> Partial:
    """Attention of ``query`` [Hq, D] float32 (scaled) over every far row."""
    Hkv = far.rows.shape[0]
    everything = Selection(
        np.tile(np.arange(far.length, dtype=np.int32), Hkv),
        np.arange(Hkv + 1, dtype=np.int64) * far.length,
        np.zeros(Hkv * far.length, np.float32),
        query.shape[0] // Hkv,
    )
    return attend_selected(query, far, everything)
