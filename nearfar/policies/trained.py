"""Trained weights of policies: files of tensors, and the model of their training.

A file is safetensors. Its metadata name the model (`geometry`: layers, query heads, KV heads and
head dimension) and the settings of the training. The scripts in `training/` write such files; those
of smollm2-135m-128k are part of the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nearfar.errors import InvalidOptionError
from nearfar.output.place import Place, check_replaced, find_place
from nearfar.output.whole import write_output
from nearfar.records import Geometry

RANDOM = "random"  # instead of a file: untrained weights, to see what the training is worth


def geometry_text(geometry: Geometry) -> str:
    """As metadata say it."""
    return (
        f"{geometry.layers} layers, {geometry.query_heads} query heads, "
        f"{geometry.kv_heads} KV heads, head dimension {geometry.head_dim}"
    )


Shapes = Callable[[Geometry], dict[str, tuple[int, ...]]]  # of all tensors, by name
Untrained = Callable[[Geometry, int], dict[str, torch.Tensor]]  # by name, from a seed


# of a file as it is now; another content under the same name has another one
Stamp = tuple[int, int, int, int] | None


def check_trained(policy: str, weights: str, geometry: Geometry) -> None:
    """Raise InvalidOptionError as `load_trained` would, but read only the file's header."""
    if weights != RANDOM:
        _check(policy, weights, geometry, _stamp(policy, weights))


@lru_cache(maxsize=4)  # a plan is made for many lengths
def _check(policy: str, weights: str, geometry: Geometry, _: Stamp) -> None:
    with _opened(policy, weights, geometry):
        pass


def trained_digest(policy: str, weights: str) -> str:
    """Identifies ``weights`` in any place: the sha256 of the file, in hex.

    RANDOM stands for itself. Raises InvalidOptionError for a file that cannot be read.
    """
    return RANDOM if weights == RANDOM else _digest(policy, weights, _stamp(policy, weights))


@lru_cache(maxsize=4)
def _digest(policy: str, weights: str, _: Stamp) -> str:
    path = _path(policy, weights)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(policy, path, error) from None


def load_trained(
    policy: str,
    weights: str,
    geometry: Geometry,
    device: torch.device,
    untrained: Untrained,
    shapes: Shapes | None = None,
) -> dict[str, torch.Tensor]:
    """Tensors float32 on ``device`` of the file ``weights``, or of the package's if empty.

    They are shared and must not be changed. RANDOM gives those of ``untrained``. Raises
    InvalidOptionError for a file that is none, was trained for a model of other sizes, or holds
    tensors of others than ``shapes``.
    """
    if weights == RANDOM:
        return _untrained(geometry, device, untrained)
    return _load(policy, weights, geometry, device, shapes, _stamp(policy, weights))


@lru_cache(maxsize=4)
def _untrained(
    geometry: Geometry, device: torch.device, untrained: Untrained
) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in untrained(geometry, 0).items()}


@lru_cache(maxsize=4)
def _load(
    policy: str,
    weights: str,
    geometry: Geometry,
    device: torch.device,
    shapes: Shapes | None,
    _: Stamp,
) -> dict[str, torch.Tensor]:
    with _opened(policy, weights, geometry) as file:
        tensors: dict[str, torch.Tensor] = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    wanted = {} if shapes is None else shapes(geometry)
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise InvalidOptionError(
                f"{_path(policy, weights)} must hold {name} of {list(shape)}. Got "
                f"{'none' if found is None else list(found)}. {_remedy(policy)}"
            )
    return {name: tensor.float().to(device) for name, tensor in tensors.items()}


@contextmanager
def _opened(policy: str, weights: str, geometry: Geometry) -> Iterator[Any]:
    """The file of a policy's weights, if its header says that it was trained for ``geometry``."""
    path, wanted = _path(policy, weights), geometry_text(geometry)
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("policy") != policy:
                raise InvalidOptionError(f"{path} holds no weights of {policy}. {_remedy(policy)}")
            if about.get("geometry") != wanted:
                raise InvalidOptionError(
                    f"{policy} was trained for a model of {about.get('geometry')}; this one "
                    f"has {wanted}. {_remedy(policy)}"
                )
            yield file
    except (OSError, SafetensorError) as error:
        raise _unreadable(policy, path, error) from None


def _unreadable(policy: str, path: Path, error: Exception) -> InvalidOptionError:
    return InvalidOptionError(f"Cannot read {path}: {error}. {_remedy(policy)}")


def _stamp(policy: str, weights: str) -> Stamp:
    try:
        status = _path(policy, weights).stat()
    except OSError:
        return None  # opening it raises the reason
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _path(policy: str, weights: str) -> Path:
    own = str(files("nearfar.policies") / "data" / f"{policy}.safetensors")
    return Path(weights or own).expanduser()


def _remedy(policy: str) -> str:
    return (
        f"Train it for this model with training/train_{policy}.py and give {policy}:maps=FILE, or "
        "choose another --policy."
    )


def trained_place(
    path: str | Path, policy: str, model: str, *, overwrite: bool = False, read: Iterable[Path] = ()
) -> Place:
    """The output path of weights of ``policy`` for ``model``; OutputNameError for another file."""

    def is_own(there: Path) -> bool:
        try:
            with safe_open(there, "pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError):
            return False
        return (metadata.get("policy"), metadata.get("model")) == (policy, model)

    place = find_place(path)
    kind = f"weights of {policy} for {model or 'this model'}"
    check_replaced(place, kind, is_own, overwrite=overwrite, read=read)
    return place


def save_trained(
    path: str | Path,
    policy: str,
    geometry: Geometry,
    tensors: dict[str, torch.Tensor],
    about: dict[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write ``tensors`` as float16; the whole file or nothing.

    A file that is there is replaced if it has weights of the same policy and of the same
    ``about["model"]``, or with ``overwrite``. Raises OutputError.
    """
    place = trained_place(path, policy, about.get("model", ""), overwrite=overwrite)
    metadata = {"policy": policy, "geometry": geometry_text(geometry), **about}
    halves = {name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}
    write_output(place, save(halves, metadata))
