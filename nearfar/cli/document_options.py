"""Options for documents: how they are read, and where they are kept."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from nearfar.cli.options import Command
from nearfar.config import parse_bytes


@dataclass(frozen=True)
class DocumentsAs:
    """How documents are read."""

    strict: bool = False  # parts that cannot be read are refused
    encoding: str | None = None  # a label; None: UTF-8, or what a page declares


def _encoding(label: str) -> str:
    """A label of an encoding, checked before a file is opened."""
    from nearfar.runtime.text.formats.encodings import check_label

    check_label(label)
    return label


def document_options(command: Command) -> Command:
    """Add --strict and --encoding; the command receives one `DocumentsAs`, ``documents_as``."""

    @functools.wraps(command)
    def with_documents_as(*args: Any, strict: bool, encoding: str | None, **values: Any) -> Any:
        return command(*args, documents_as=DocumentsAs(strict, encoding), **values)

    decorated: Command = with_documents_as
    decorated = click.option(
        "--encoding",
        type=_encoding,
        metavar="LABEL",
        help="Encoding of text and HTML without a byte order mark, like windows-1252.  [default: "
        "UTF-8, or the encoding that a page declares]",
    )(decorated)
    return click.option(
        "--strict",
        is_flag=True,
        help="Refuse a document if a part of it cannot be read, like a page that is a picture.",
    )(decorated)


def folder_name(text: str) -> str:
    """The name of a folder, which need not exist yet."""
    if not text:
        raise click.BadParameter("'' is no name of a folder. Name one.")
    if Path(text).exists() and not Path(text).is_dir():
        raise click.BadParameter(f"{text} is a file. Name a folder.")
    return text


def cache_options(command: Command) -> Command:
    """Add --cache-dir and --cache-limit."""
    options = [
        click.option(
            "--cache-dir",
            type=folder_name,
            metavar="FOLDER",
            help="Folder of kept documents.  [default: in nearfar's cache folder]",
        ),
        click.option(
            "--cache-limit",
            type=parse_bytes,
            metavar="SIZE",
            default="20GiB",
            show_default=True,
            help="Above this size, the least recently used documents are removed.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
