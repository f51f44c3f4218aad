"""Every family by the `model_type` of its config.json.

The table below is all that a new family needs beside its own file. Other packages register theirs
as an entry point of the group `nearfar.families`, whose value is the family's class.
"""

from __future__ import annotations

from functools import cache

from nearfar.named import Named
from nearfar.runtime.models.families.base import Family

BUILT_IN = {
    "llama": "nearfar.runtime.models.families.llama:Llama",
    "mistral": "nearfar.runtime.models.families.mistral:Mistral",
    "qwen2": "nearfar.runtime.models.families.qwen2:Qwen2",
    "qwen3": "nearfar.runtime.models.families.qwen3:Qwen3",
    "smollm3": "nearfar.runtime.models.families.smollm3:SmolLM3",
}
_FAMILIES = Named("family of models", "families of models", "nearfar.families", BUILT_IN)


def family_names() -> list[str]:
    """Model types that can be read: the built-in ones in their order, then others."""
    return _FAMILIES.names()


@cache
def _made(kind: type[Family]) -> Family:
    return kind()


def family_named(name: str) -> Family:
    """The family of a model type; UnknownNameError where there is none."""
    return _made(_FAMILIES.load(name))


def gguf_families() -> dict[str, Family]:
    """Families by the architecture that their GGUF files name."""
    families = [family_named(name) for name in family_names()]
    return {family.gguf.architecture: family for family in families if family.gguf is not None}
