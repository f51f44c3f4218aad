"""Values of a JSON configuration, checked as they are read; null counts as absent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nearfar.errors import CheckpointError, UnsupportedModelError


class Fields:
    """A JSON object ``values``; ``where`` names its file in errors."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is, or ``default``."""
        value = self.values.get(key)
        return default if value is None else value

    def require(self, key: str, default: Any = None) -> Any:
        """The unchanged value; CheckpointError if there is neither value nor default."""
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(
                f"{self.where} has no {key!r}, which is needed to build the model. "
                "Download the file again, or take the model from another source."
            )
        return value

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, ``least`` or more."""
        value = self.require(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(key, f"a whole number, {least} or more", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.require(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise self._wrong(key, "a number above 0", value)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; 0 and 1 count as such."""
        value = self.get(key, default)
        if value not in (0, 1):
            raise self._wrong(key, "true or false", value)
        return bool(value)

    def items(self, key: str, default: list[Any]) -> list[Any]:
        """A list."""
        value = self.get(key, default)
        if not isinstance(value, list):
            raise self._wrong(key, "a list", value)
        return value

    def nested(self, key: str) -> Fields:
        """An object inside this one, empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return Fields(value, self.where)

    def unsupported(self, what: str, supported: str) -> UnsupportedModelError:
        """The error for a config that needs ``what``, which is not implemented."""
        return UnsupportedModelError(
            f"{self.where} asks for {what}, which is not supported. Supported: {supported}."
        )

    def _wrong(self, key: str, rule: str, value: object) -> CheckpointError:
        return CheckpointError(f"{key!r} in {self.where} must be {rule}. Got {value!r}.")
