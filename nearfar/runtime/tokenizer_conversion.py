"""Tokenizers that are not a tokenizer.json, rewritten as one by transformers.

Importing transformers takes seconds, so this is done once per model and the files are kept. What it
writes is read by `nearfar.runtime.tokenizer`; where the files are kept is not known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.tokenizer_files import DEFINITION

_CUT_AS_GPT2 = (None, "", "default", "gpt-2", "gpt2")
_CUT_AT_DIGITS = ("smollm",)  # and then as GPT-2; transformers leaves numbers whole


def write_gguf_tokenizer(path: Path, word_rule: str | None, folder: Path) -> None:
    """The tokenizer inside the GGUF ``path``, as Hugging Face files in ``folder``.

    ``word_rule`` is the name by which the file says how text is cut into words before they are made
    tokens (tokenizer.ggml.pre). Raises UnsupportedModelError for one that is not known: a wrong one
    gives wrong tokens silently. CheckpointError where the file has no usable tokenizer.
    """
    converted = _from_transformers(path, path.parent, gguf_file=path.name)
    backend = converted.backend_tokenizer
    if word_rule in _CUT_AT_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    elif word_rule not in _CUT_AS_GPT2 and isinstance(
        backend.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        raise UnsupportedModelError(
            f"{path} cuts text into words by the rule {word_rule!r}, which is not supported. "
            "Use the model's Hugging Face folder instead."
        )
    converted.save_pretrained(folder)


def write_slow_tokenizer(model: Path, folder: Path) -> None:
    """The tokenizer of the folder ``model``, which has no tokenizer.json, as files in ``folder``.

    Raises CheckpointError where there is none, or none that can be converted.
    """
    _from_transformers(model, model).save_pretrained(folder)
    if not (folder / DEFINITION).is_file():
        raise CheckpointError(
            f"The tokenizer in {model} cannot be converted to {DEFINITION}, which is needed. "
            f"Save it with a version of transformers that writes {DEFINITION}."
        )


def _from_transformers(path: Path, folder: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds, once per model

    # AutoTokenizer would read the config of a GGUF too, and refuse architectures it cannot build
    kind = PreTrainedTokenizerFast if options else AutoTokenizer
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # whatever a missing or damaged part makes transformers raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"{path} has no tokenizer that can be read: {reason} "
            "Take the model from another source."
        ) from error
