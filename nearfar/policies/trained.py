"""Weights that some policies were trained to: files of tensors with what they were trained for.

A file is safetensors. Its metadata says for which model (`geometry`: layers, query heads, KV heads
and head dimension) and how it was made. The scripts in `training/` write them; those of
smollm2-135m-128k are part of the package.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nearfar.errors import InvalidOptionError
from nearfar.records import Geometry

RANDOM = "random"  # instead of a file: untrained weights, to see what the training is worth


def geometry_text(geometry: Geometry) -> str:
    """As metadata say it."""
    return (
        f"{geometry.layers} layers, {geometry.query_heads} query heads, "
        f"{geometry.kv_heads} KV heads, head dimension {geometry.head_dim}"
    )


@lru_cache(maxsize=4)
def load_trained(
    policy: str, weights: str, geometry: Geometry, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors float32 on ``device`` of the file ``weights``, or of the package's if empty.

    Raises InvalidOptionError for a file that is none, or was trained for a model of other sizes.
    """
    path = Path(weights) if weights else Path(str(files("nearfar.policies") / "data" / policy))
    path = path if weights else path.with_suffix(".safetensors")
    remedy = f"Train it for this model with training/train_{policy}.py and give {policy}:maps=FILE."
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            wanted = geometry_text(geometry)
            if about.get("policy") != policy:
                raise InvalidOptionError(
                    f"{path} holds nothing that {policy} was trained to. {remedy}"
                )
            if about.get("geometry") != wanted:
                raise InvalidOptionError(
                    f"{policy} was trained for a model of {about.get('geometry')}, and this one "
                    f"has {wanted}. {remedy}"
                )
            names = file.keys()
            return {name: file.get_tensor(name).float().to(device) for name in names}
    except (OSError, SafetensorError) as error:
        raise InvalidOptionError(f"Cannot read {path}: {error}. {remedy}") from None


def save_trained(
    path: Path,
    policy: str,
    geometry: Geometry,
    tensors: dict[str, torch.Tensor],
    about: dict[str, str],
) -> None:
    """Write ``tensors`` as float16; all of the file or nothing."""
    partial = path.with_name(path.name + ".part")
    metadata = {"policy": policy, "geometry": geometry_text(geometry), **about}
    halves = {name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(halves, partial, metadata)
    partial.replace(path)
