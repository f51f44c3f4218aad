"""A GGUF file read as if it were a Hugging Face checkpoint: a config and tensors by their names.

Metadata becomes the content of a config.json; tensors are dequantised to float32 one at a time, on
demand. Where llama.cpp rotates neighbouring dimensions together, a file keeps the rows of q and k
in that order; they are reordered into the half-split order used here. This module converts and
checks; it builds no models and writes nothing.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from nearfar.config import counted
from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.checkpoints.gguf_keys import refused_key
from nearfar.runtime.checkpoints.gguf_rope import rope_scaling
from nearfar.runtime.models.families.registry import gguf_families
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.models.weights import assemble

_LENGTH_BYTES = 8  # of a string or an array: the least that one takes
_ROPE_DIVISORS = "rope_freqs.weight"
# what the config says already, and tables of rotary frequencies that old files keep
_UNNEEDED = re.compile(r"^rope_freqs\.weight$|\.attn_rot_embd(\.weight)?$")
_COUNTS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """GGUFReader that notices the end of the file, also inside strings and arrays."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends in the middle")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """As the library, but numbers of an array at once, and no array longer than the file."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start, item = orig_offs + 12, gguf.GGUFValueType(kind[0])
        number = self.gguf_scalar_to_np.get(item)
        least = _LENGTH_BYTES if number is None else np.dtype(number).itemsize
        if start + least * int(length[0]) > len(self.data):
            raise ValueError("it ends in the middle")
        if number is None:
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(start, number, length[0])
        types = [gguf.GGUFValueType.ARRAY, item]
        return 12 + values.nbytes, [kind, length, values], [2], types


class GgufFile:
    """The file ``path``, its metadata and tensor table read and its tensors mapped.

    Raises CheckpointError where it is truncated or corrupt, UnsupportedModelError for an
    architecture or a feature that is not implemented.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = _Reader(path)
        # what reading a damaged file raises depends on where the damage is
        except (ValueError, LookupError, TypeError, OverflowError, MemoryError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a whole GGUF file: {error}. Delete it and download it again."
            ) from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self._require("general.architecture"))
        self._check_kind()
        self._check_keys()
        names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(
            # a damaged count of layers may be any number
            names[self.architecture],
            min(self.config["num_hidden_layers"], len(self._tensors)),
        )

    def value(self, key: str, default: Any = None) -> Any:
        """Metadata ``key`` as a Python value, or ``default``."""
        field = self._fields.get(key)
        try:
            return default if field is None else field.contents()
        except ValueError as error:
            raise CheckpointError(
                f"{self.path} has an unreadable value of {key!r} ({error}). Download it again."
            ) from error

    def keys(self, prefix: str) -> list[str]:
        """Metadata keys that begin so."""
        return [key for key in self._fields if key.startswith(prefix)]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of a config.json with the metadata's settings."""
        counts = {key: self._require(self._own(name)) for key, name in _COUNTS.items()}
        heads = counts["num_attention_heads"]
        window = self.value(self._own("attention.sliding_window"), 0)
        if window:
            counts["max_position_embeddings"] = min(window, counts["max_position_embeddings"])
        stops = (self.value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return {
            "model_type": self.architecture,
            **counts,
            "num_key_value_heads": self.value(self._own("attention.head_count_kv"), heads),
            "head_dim": self._head_dim(heads, counts["hidden_size"]),
            "vocab_size": int(self._tensor("token_embd.weight").shape[1]),
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "rope_theta": self.value(self._own("rope.freq_base"), 10_000.0),
            "rope_scaling": self._rope_scaling(),
            "eos_token_id": [stop for stop in dict.fromkeys(stops) if stop is not None],
        }

    def tensor(self, name: str) -> Tensor:
        """The tensor with the Hugging Face ``name``, float32, in its layout.

        Raises KeyError where the file has none, UnsupportedModelError for a quantisation that the
        gguf library does not decode.
        """
        stored = self._tensors[self._own_name(name)]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            kind = stored.tensor_type.name
            raise self._unsupported(f"tensors quantised as {kind}", "what gguf decodes") from error
        tensor = torch.from_numpy(np.require(values, np.float32, "W"))
        if self._turns_neighbours and (".q_proj." in name or ".k_proj." in name):
            return _half_split(tensor, self.config["head_dim"])
        return tensor

    def check_complete(self, config: ModelPlan) -> None:
        """Raise unless the file has exactly the weights that ``config`` needs."""
        asked: set[str] = set()

        def unread(name: str) -> Tensor:
            own_name = self._own_name(name)
            asked.add(own_name)
            shape = reversed(self._tensors[own_name].shape.tolist())
            return torch.empty(tuple(shape), device="meta")

        assemble(unread, config, torch.float32, torch.device("meta"))
        left = [name for name in self._tensors if name not in asked and not _UNNEEDED.search(name)]
        if left:
            named = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            raise self._unsupported(
                f"{counted(len(left), 'tensor')} that {self.architecture} does not use ({named})",
                "files with the standard tensors",
            )

    @property
    def num_tensors(self) -> int:
        """Tensors in the file."""
        return len(self._tensors)

    def _own_name(self, name: str) -> str:
        """The file's name of a tensor with the Hugging Face ``name``; KeyError if it has none."""
        own_name = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own_name not in self._tensors:
            raise KeyError(name)
        return str(own_name)

    def _own(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _require(self, key: str) -> Any:
        value = self.value(key)
        if value is None:
            raise CheckpointError(
                f"{self.path} has no metadata {key!r}, which is needed to build the model. "
                "Take the file from another source."
            )
        return value

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}, which is needed to build the model. "
                "Take the file from another source."
            )
        return self._tensors[name]

    def _unsupported(self, what: str, supported: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path} has {what}, which is not supported. Supported: {supported}."
        )

    def _head_dim(self, heads: Any, hidden_size: int) -> int:
        """Head dimension; keys, values and rotary embedding must agree on it."""
        experts = self.value(self._own("expert_count"), 0)
        if experts or not isinstance(heads, int):
            raise self._unsupported("experts, or layers that differ in size", "dense, equal layers")
        head_dim = int(self.value(self._own("attention.key_length"), hidden_size // heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            other = self.value(self._own(key), head_dim)
            if other != head_dim:
                raise self._unsupported(
                    f"key heads of {head_dim} dimensions but {key} of {other}", "equal ones"
                )
        return head_dim

    def _rope_scaling(self) -> dict[str, Any] | None:
        """The rope_scaling of a config.json."""
        stored, divisors = self._tensors.get(_ROPE_DIVISORS), None
        if stored is not None:
            divisors = torch.from_numpy(np.array(stored.data, np.float32))
        return rope_scaling(
            lambda key: self.value(self._own(f"rope.{key}")), divisors, self._unsupported
        )

    def _check_kind(self) -> None:
        """Raise unless the file is a whole model of a known architecture."""
        kind = self.value("general.type", "model")
        if kind != "model":
            raise self._unsupported(f"not a model but {kind!r} (general.type)", "models")
        families = gguf_families()
        if self.architecture not in families:
            supported = ", ".join(families)
            raise self._unsupported(f"the architecture {self.architecture!r}", supported)
        gguf_form = families[self.architecture].gguf
        self._turns_neighbours = gguf_form is not None and gguf_form.neighbour_rotary
        if self.value("split.count", 1) > 1:
            raise self._unsupported("only a part of the model (it is split)", "whole files")

    def _check_keys(self) -> None:
        """Raise for a setting that would change results and is not computed."""
        own = self._own("")
        keys = [key.removeprefix(own) for key in self.keys(own)]
        metadata = {key: self.value(own + key) for key in keys}
        found = refused_key(metadata, self.config["head_dim"] ** -0.5)
        if found is not None:
            raise self._unsupported(
                f"the setting {own}{found} = {metadata[found]!r}", "files that do without it"
            )


def _half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Rows [heads D, ...] reordered from rotated neighbours to rotated halves of a head."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
