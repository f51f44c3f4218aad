"""Settings of the engine and of sampling, with their defaults and their rules.

The CLI takes its defaults from the fields below and the Python API passes the same objects, so each
default is written once. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from nearfar.errors import InvalidOptionError

DEFAULT_MODEL = "smollm2-135m-128k"
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
FAR_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4", "kivi-4", "kivi-2")
GIB = 2**30
DEFAULT_CACHE_BYTES = 20 * GIB  # of documents that are kept

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes in a size such as ``24GiB``, ``800 MB`` or ``4096``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise InvalidOptionError(
            f"A size is a number and a unit, like 24GiB or 800MB. Got {text!r}."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(num_bytes: float) -> str:
    """A size for people, in binary units: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def counted(number: int, noun: str) -> str:
    """A number and what it counts: ``1 file``, ``2 files``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def cache_root() -> Path:
    """Where nearfar keeps what it fetched, decoded and compiled; it may not exist yet."""
    own = os.environ.get("NEARFAR_CACHE_DIR")
    return Path(own).expanduser() if own else user_cache_path("nearfar")


@dataclass(frozen=True)
class Budget:
    """How many far keys a KV group may read per step: a count, or below 1 a share of them."""

    value: float

    def __post_init__(self) -> None:
        number = isinstance(self.value, (int, float)) and math.isfinite(self.value)
        if not number or self.value <= 0 or (self.value > 1 and self.value != int(self.value)):
            raise _not_a_budget(self.value)

    @classmethod
    def of(cls, given: float | str, token_bytes: int) -> Budget:
        """The budget of a setting: a size like ``16MiB`` is the bytes of a token in all layers.

        ``token_bytes`` are those of one key and value in every layer and KV head.
        """
        if not isinstance(given, str):
            return cls(given)
        keys = parse_bytes(given) // token_bytes
        if keys < 1:
            raise InvalidOptionError(
                f"A budget of {given} is too small: one key and value in every layer and KV head "
                f"take {format_bytes(token_bytes)}. Give more, or a number of keys."
            )
        return cls(keys)

    def keys(self, num_keys: int) -> int:
        """Keys to read out of ``num_keys``, at most all of them."""
        wanted = math.ceil(self.value * num_keys) if self.value < 1 else int(self.value)
        return min(wanted, num_keys)


def parse_budget(text: str) -> float | str:
    """The budget that ``text`` means: a number, or a size as it was written."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check_budget(given: float | str) -> None:
    if not isinstance(given, str):
        Budget(given)
        return
    try:
        positive = parse_bytes(given) > 0
    except InvalidOptionError:
        positive = False
    # a number in a string is a mistake: keys or bytes?
    if not positive or not given.strip()[-1].isalpha():
        raise _not_a_budget(given)


def _not_a_budget(given: object) -> InvalidOptionError:
    return InvalidOptionError(
        "A budget is a whole number of far keys per KV group (like 1024), a share of them between "
        "0 and 1 (like 0.02), or what a token may read of keys and values in all layers (like "
        f"16MiB). Got {given!r}."
    )


def generator_seed(seed: int) -> int:
    """The seed for generators of random numbers: below 2**63, which all of them accept.

    Seeds in that range stay as they are; any other integer is hashed into it.
    """
    if 0 <= seed < 2**63:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big") >> 1


def _whole_number(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _require_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is a whole number and not below ``least``."""
    _require(_whole_number(value), name, "a whole number", value)
    _require(value >= least, name, f"{least} or more", value)


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise InvalidOptionError(f"{name} must be {rule}. Got {value!r}.")


@dataclass(frozen=True)
class EngineConfig:
    """How the engine holds and reads a context."""

    policy: str = "sketch"  # registered name, optionally with parameters: name:key=value
    budget: float | str = 1024  # far keys per KV group and step; below 1 a share; or 16MiB a token
    sinks: int = 4  # first tokens, always near
    window: int = 64  # last tokens, always near
    dtype: str = "auto"  # of weights and activations; auto: bfloat16 where the hardware has it
    far_dtype: str = "bfloat16"  # of keys and values in far memory
    device: str = "auto"  # of near memory: auto, cpu, cuda, cuda:1
    threads: int | None = None  # host threads; None: physical cores
    near_memory_bytes: int | None = None  # cap; None: what the device has free
    far_memory_bytes: int | None = None  # cap; None: what the host has free
    chunk_tokens: int | None = None  # prompt tokens read together; None: by device
    seed: int = 0  # of the policy's random draws
    thinking: bool | None = None  # of models with a switch for it; None: their template decides

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        _require_count("sinks", self.sinks, 0)
        _require_count("window", self.window, 1)
        _require(self.dtype in COMPUTE_DTYPES, "dtype", f"one of {COMPUTE_DTYPES}", self.dtype)
        _require(self.far_dtype in FAR_DTYPES, "far dtype", f"one of {FAR_DTYPES}", self.far_dtype)
        _require(_whole_number(self.seed), "seed", "a whole number", self.seed)
        for name in ("threads", "chunk_tokens"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name), 1)
        _require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            "device",
            "auto, cpu, cuda or cuda:N",
            self.device,
        )

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with other values; an unknown name is an error."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            _require(name in known, "setting", f"one of {sorted(known)}", name)
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn from the logits."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0  # smallest set of tokens with at least this probability
    seed: int = 0

    def __post_init__(self) -> None:
        _require_count("max-new-tokens", self.max_new_tokens, 1)
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            "0 or more",
            self.temperature,
        )
        _require(_whole_number(self.seed), "seed", "a whole number", self.seed)
        _require(0 < self.top_p <= 1, "top-p", "above 0 and at most 1", self.top_p)


DEFAULT_CONFIG = EngineConfig()
DEFAULT_SAMPLING = SamplingConfig()
