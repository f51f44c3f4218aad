"""Recognises a folder that another tool quantised, by its config, its files or its tensors.

Such weights are not read. An error can then name the tool instead of a missing tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Files that a tool leaves beside the weights.
_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
    "qmodel.pt": "HQQ",
}
# How names of tensors end; the first that fits, so what is special to a tool comes first.
_ENDINGS = (
    (".trellis", "EXL3"),
    (".q_weight", "EXL2"),
    (".W_q", "HQQ"),
    (".weight._data", "quanto"),
    (".weight.quant_map", "bitsandbytes"),
    (".weight.absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_2", "NVFP4"),
    (".g_idx", "GPTQ"),
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".biases", "MLX"),
    (".scales", "MLX"),
    (".weight_scale_inv", "FP8"),
    (".weight_scale", "FP8 or INT8"),
    (".input_scale", "FP8 or INT8"),
    (".k_scale", "FP8 keys"),
    (".v_scale", "FP8 values"),
    (".kv_scale", "FP8 keys and values"),
    ("_scale_inv", "a type of 8 bits"),
    ("_scale", "a type of 8 bits"),
    (".scale", "scales of its own"),
)
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names of what is read


def quantisation_of(config: Mapping[str, Any]) -> str | None:
    """The method of quantisation that a config.json names."""
    for key in ("quantization_config", "compression_config", "quantization"):
        described = config.get(key)
        if not described:
            continue
        if not isinstance(described, Mapping):
            return str(described)
        if key == "quantization" and "quant_method" not in described:
            return f"MLX, {described.get('bits', 'unknown')} bits"
        default = "compressed-tensors" if key == "compression_config" else _unnamed(described)
        return str(described.get("quant_method", described.get("quant_algo", default)))
    return None


def _unnamed(described: Mapping[str, Any]) -> str:
    loads = any(key.startswith(("load_in_", "_load_in_", "bnb_")) for key in described)
    return "bitsandbytes" if loads else "unnamed"


def quantised_by_files(folder: Path) -> tuple[str, str] | None:
    """A tool and the file in ``folder`` that shows it."""
    for name, tool in _FILES.items():
        if (folder / name).is_file():
            return tool, name
    return None


def quantised_by_tensors(names: Iterable[str]) -> tuple[str, str] | None:
    """A tool and the tensor that shows it."""
    ordered = sorted(names)
    for ending, tool in _ENDINGS:
        if found := next((name for name in ordered if name.endswith(ending)), None):
            return tool, found
    return None


def packed_tensor(dtypes: Mapping[str, str]) -> str | None:
    """A tensor of a type that no plain weight has, from safetensors' types by name."""
    packed = (name for name, dtype in dtypes.items() if dtype not in PLAIN_DTYPES)
    return min(packed, default=None)
