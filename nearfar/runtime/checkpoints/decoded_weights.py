"""Weights decoded once and mapped from then on.

Dequantising takes seconds to minutes; its result, in the decoder's fused layout and one storage
type, is kept as a safetensors file. It is mapped, not read: on the CPU nothing is copied, and the
processes that use a model share its pages. A file that is truncated, damaged in its header or of
another format is made again; a bit that flipped inside the numbers is not noticed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nearfar.errors import CheckpointError
from nearfar.runtime.checkpoints.cache_folder import locked, written_whole
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.models.weights import Weights, checked_weights, total_bytes

_METADATA = {"format": "nearfar weights 1"}
_log = logging.getLogger(__name__)


def decoded_weights(
    path: Path,
    config: ModelPlan,
    device: torch.device,
    decode: Callable[[], Weights],
) -> Weights:
    """The weights kept in ``path``, on ``device``; ``decode`` makes them if they are missing.

    Raises CheckpointError where the disk has no room for them.
    """
    weights = _mapped(path, config, device)
    if weights is not None:
        return weights
    with locked(path):
        weights = _mapped(path, config, device)  # another process may have made them
        if weights is None:
            decoded = decode()
            with written_whole(path, total_bytes(decoded)) as temporary:
                save_file(dict(decoded), temporary, metadata=_METADATA)
            weights = _mapped(path, config, device)
    if weights is None:
        raise CheckpointError(
            f"{path} was written and cannot be read back. Check the disk, or set "
            "NEARFAR_CACHE_DIR to a folder on another one."
        )
    return weights


def _mapped(path: Path, config: ModelPlan, device: torch.device) -> Weights | None:
    """The weights in ``path``; None if the file is missing or invalid."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            if file.metadata() != _METADATA:
                _log.warning("%s has another format and is made again.", path)
                return None
            names = list(file.keys())
            return checked_weights({name: file.get_tensor(name) for name in names}, config)
    except (SafetensorError, CheckpointError, OSError) as error:
        _log.warning("%s is damaged (%s) and is made again.", path, error)
        return None
