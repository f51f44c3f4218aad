"""Tokenizers of folders without a tokenizer.json, rewritten as one by transformers.

Importing transformers takes seconds, so this is done once per model and the files are kept.
`nearfar.runtime.text.tokenizer` reads the files; this module does not know where they are kept.
"""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path

from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.checkpoints.tokenizer_files import DEFINITION

_MODEL = "tokenizer.model"
_VOCABULARIES = (_MODEL, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def write_slow_tokenizer(model: Path, folder: Path) -> None:
    """The tokenizer of the folder ``model``, which has no tokenizer.json, as files in ``folder``.

    Raises UnsupportedModelError for a tokenizer of tiktoken, CheckpointError if there is none or it
    cannot be converted.
    """
    if _is_tiktoken(model / _MODEL):
        raise UnsupportedModelError(
            f"{model / _MODEL} is a tokenizer of tiktoken, which says neither how text is cut into "
            f"words nor what its control tokens are. Put the model's {DEFINITION} beside it."
        )
    if not any((model / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(
            f"{model} has no tokenizer: expected {DEFINITION}, or one of the older "
            f"{', '.join(_VOCABULARIES)}. Download the model again, all of its files."
        )
    from transformers import AutoTokenizer  # seconds, once per model

    try:
        converted = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # transformers raises errors of any type on damaged files
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"{model} has no tokenizer that can be read: {reason} "
            "Take the model from another source."
        ) from error
    converted.save_pretrained(folder)
    if not (folder / DEFINITION).is_file():
        raise CheckpointError(
            f"The tokenizer in {model} cannot be converted to {DEFINITION}, which is needed. "
            f"Save it with a version of transformers that writes {DEFINITION}."
        )


def _is_tiktoken(path: Path) -> bool:
    """Whether the file is lines of a token in base64 and its rank."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        parts = file.readline(1000).split()
    if len(parts) != 2 or not parts[1].isdigit():
        return False
    try:
        b64decode(parts[0], validate=True)
    except ValueError:
        return False
    return True
