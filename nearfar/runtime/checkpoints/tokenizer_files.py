"""A model's tokenizer, its settings and its chat template, found where transformers finds them.

A template can be in five places; `_chat_template` says which one wins. This module reads files and
judges only their form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nearfar.errors import CheckpointError
from nearfar.runtime.checkpoints.folder_files import json_object
from nearfar.runtime.text.special_tokens import marks_of
from nearfar.runtime.text.tokenizer import Tokenizer

DEFINITION = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"  # where settings were before transformers 4.34
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of named ones
OLD_TEMPLATE = "chat_template.json"  # of processors
_DEFAULT = "default"


def read_tokenizer(folder: Path, eos_token_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokenizer in ``folder``: tokenizer.json, its settings and a chat template.

    Raises CheckpointError for a missing or invalid file.
    """
    definition = _read(folder / DEFINITION)
    settings = _settings(folder)
    template = _chat_template(folder, settings)
    try:
        return Tokenizer(definition, settings, template, eos_token_ids)
    except Exception as error:  # the library raises a bare Exception
        broken = (ValueError, KeyError, TypeError, AttributeError)
        if type(error) is not Exception and not isinstance(error, broken):
            raise
        raise CheckpointError(
            f"{folder / DEFINITION} is not a valid tokenizer ({error}). Download the file again."
        ) from error


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of an older file beside it."""
    settings = _read_object(folder / SETTINGS)
    if "added_tokens_decoder" not in settings:
        settings |= _read_object(folder / TOKENS_MAP)
    try:
        marks_of(settings)
    except ValueError as error:
        raise CheckpointError(f"{error} It is in {folder / SETTINGS}.") from error
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(_is_token(*item) for item in listed.items()):
        raise CheckpointError(
            f"'added_tokens_decoder' in {folder / SETTINGS} must be an object of ids, each with a "
            "token's 'content'. Download the file again."
        )
    return settings


def _is_token(number: str, token: object) -> bool:
    return number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template for conversations.

    Files of their own win over the settings, all of them together; one that only processors read
    comes last.
    """
    files = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    named: dict[str, Any] = {file.stem: _read(file) for file in files}
    if (folder / CHAT_TEMPLATE).is_file():
        named[_DEFAULT] = _read(folder / CHAT_TEMPLATE)
    if named:
        return default_of(named, folder)
    for where in (folder / SETTINGS, folder / OLD_TEMPLATE):
        held = settings if where.name == SETTINGS else _read_object(where)
        if held.get("chat_template") is not None:
            return _default_template(held["chat_template"], where)
    return None


def _default_template(value: object, where: Path) -> str:
    """A chat template of JSON: a text, a list of named ones or an object of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in value]
        value = {entry.get("name"): entry.get("template") for entry in entries}
    if not isinstance(value, dict) or not all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        raise CheckpointError(
            f"'chat_template' in {where} must be a text, or texts with names: a list of objects "
            "with 'name' and 'template', or one object. Download the file again."
        )
    return default_of(value, where)


def default_of(named: Mapping[str, str], where: Path) -> str:
    """The one of several templates that is for conversations as such."""
    if _DEFAULT not in named:
        names = ", ".join(sorted(named)) or "nothing"
        raise CheckpointError(
            f"{where} has chat templates for {names}, and none that is named {_DEFAULT!r}. "
            "Give the one to use that name."
        )
    return named[_DEFAULT]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Download the model again."
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no file."""
    if not path.is_file():
        return {}
    return json_object(_read(path), path)
