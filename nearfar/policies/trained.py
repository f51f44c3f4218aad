"""Weights that some policies were trained to: files of tensors with what they were trained for.

A file is safetensors. Its metadata says for which model (`geometry`: layers, query heads, KV heads
and head dimension) and how it was made. The scripts in `training/` write them; those of
smollm2-135m-128k are part of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

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


def check_trained(policy: str, maps: str, geometry: Geometry) -> None:
    """Raise InvalidOptionError unless the weights are there and for a model of this geometry."""
    with _opened(policy, maps) as (file, path, remedy):
        about, wanted = file.metadata() or {}, geometry_text(geometry)
        if about.get("policy") != policy:
            raise InvalidOptionError(f"{path} holds no weights of {policy}. {remedy}")
        if about.get("geometry") != wanted:
            raise InvalidOptionError(
                f"{policy} was trained for a model of {about.get('geometry')}; this one has "
                f"{wanted}. {remedy}"
            )


@lru_cache(maxsize=4)
def load_trained(
    policy: str, maps: str, geometry: Geometry, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors float32 on ``device`` of the file ``maps``, or of the package's own if empty.

    Raises InvalidOptionError as `check_trained` does.
    """
    check_trained(policy, maps, geometry)
    with _opened(policy, maps) as (file, _, _):
        names = file.keys()
        return {name: file.get_tensor(name).float().to(device) for name in names}


@contextmanager
def _opened(policy: str, maps: str) -> Iterator[tuple[Any, Path, str]]:
    """The file of weights, its path, and what to do where it does not serve."""
    own = Path(str(files("nearfar.policies"))) / "data" / f"{policy}.safetensors"
    path = Path(maps).expanduser() if maps else own
    remedy = (
        f"Train it for this model with training/train_{policy}.py and give {policy}:maps=FILE, or "
        "choose another --policy."
    )
    try:
        with safe_open(path, "pt") as file:
            yield file, path, remedy
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
