"""Things that are found by name: nearfar's own in a table, others' by entry points of packages.

A table maps a name to `module:attribute`, which is imported at its first use. Another package
registers its own in its entry points. A name that is taken is an error, not a silent replacement.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nearfar.errors import InvalidOptionError, UnknownNameError


class Named:
    """One kind of things, such as policies."""

    def __init__(self, kind: str, plural: str, group: str, built_in: Mapping[str, str]) -> None:
        self.kind, self._plural, self.group, self._built_in = kind, plural, group, built_in

    def names(self) -> list[str]:
        """The built-in ones in their order, then others."""
        return [*self._built_in, *sorted(self._registered())]

    def check(self, name: str) -> None:
        """Raise UnknownNameError, with the nearest name, if nothing is registered as ``name``.

        Nothing is imported for it.
        """
        if name not in self._built_in and name not in self._registered():
            raise UnknownNameError(self.kind, name, self.names())

    def load(self, name: str) -> Any:
        """The object registered as ``name``; UnknownNameError with the nearest name."""
        if name in self._built_in:
            module, _, attribute = self._built_in[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        self.check(name)
        others = self._registered()
        try:
            return others[name].load()
        except Exception as error:  # another package's code may fail in any way
            raise InvalidOptionError(
                f"The {self.kind} {name!r} ({others[name].value}) cannot be loaded: {error}. "
                "Mend or uninstall the package that registers it."
            ) from error

    def _registered(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            if entry.name in self._built_in or entry.name in found:
                raise InvalidOptionError(
                    f"Two {self._plural} are registered as {entry.name!r}; one of them is "
                    f"{entry.value}. Uninstall one or rename its entry point."
                )
            found[entry.name] = entry
        return found
