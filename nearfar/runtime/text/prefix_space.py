"""The space that some tokenizers put before a text.

Tokenizers of the SentencePiece line write a word with the space before it, and so add one where a
text starts. Encoding the rest of a text on its own must not add one. This module edits the content
of a tokenizer.json and knows nothing else.
"""

from __future__ import annotations

from typing import Any


def without_prefix_space(definition: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """``definition`` changed so that no space is added; None where it adds none.

    The second value says whether the original adds one after every control token, as some do, or
    only at the very start.
    """
    normalizer, normalizer_adds = _without_prepend(definition.get("normalizer"))
    pre_tokenizer, scheme = _never_prepend(definition.get("pre_tokenizer"))
    if not normalizer_adds and scheme == "never":
        return None, False
    changed = definition | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    return changed, normalizer_adds or scheme == "always"


def _without_prepend(normalizer: dict[str, Any] | None) -> tuple[dict[str, Any] | None, bool]:
    """The normalizer without `Prepend` steps, and whether it had any."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return None, normalizer is not None
    if normalizer["type"] != "Sequence":
        return normalizer, False
    kept = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
    return normalizer | {"normalizers": kept}, len(kept) < len(normalizer["normalizers"])


def _never_prepend(step: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
    """The pre-tokenizer that adds no space, and when it did: always, first or never."""
    if step is None:
        return None, "never"
    if step["type"] == "Sequence":
        inner = [_never_prepend(part) for part in step["pretokenizers"]]
        schemes = [scheme for _, scheme in inner if scheme != "never"]
        return step | {"pretokenizers": [part for part, _ in inner]}, (schemes or ["never"])[0]
    adds = step.get("add_prefix_space", False)
    scheme = step.get("prepend_scheme", "always" if adds else "never")
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never", "add_prefix_space": False}, scheme
    return (step | {"add_prefix_space": False}, "always") if adds else (step, "never")
