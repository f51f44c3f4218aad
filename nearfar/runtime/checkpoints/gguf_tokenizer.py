"""The tokenizer inside a GGUF file, written as the files of a Hugging Face folder.

A file names the kind of its tokenizer (`tokenizer.ggml.model`) and, for byte-level ones, the rule
by which text is cut into words before these are made tokens (`tokenizer.ggml.pre`). Known names are
built; unknown ones are refused and named, because wrong words give wrong answers without a sign.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.checkpoints.gguf_file import GgufFile
from nearfar.runtime.checkpoints.tokenizer_files import DEFINITION, SETTINGS, default_of

_KEY = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type
# As in the tokenizer.json of the models that the names are from; sources: transformers 5's table
# for GGUF and the tokenizers of Llama 3, Qwen2 and Mistral NeMo.
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
_SPLITS = {
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")  # before any merging
_BEGIN_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")  # unless a file says
_GPT2 = ("gpt-2", "gpt2")
_AT_DIGITS = "smollm"  # and then as GPT-2
_UNNAMED = ("", "default")  # written by converters that do not recognise the rule
_OF_ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen2", "smollm3": "llama-bpe"}
# settings of SentencePiece that no supported family has, and their values that change nothing
_OFF = {"remove_extra_whitespaces": False, "precompiled_charsmap": (), "escape_whitespaces": True}


def write_gguf_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write the tokenizer, its settings and chat template of ``file`` to ``folder``.

    Raises UnsupportedModelError for a kind, rule or setting that is not known, CheckpointError
    where the file has no usable tokenizer.
    """
    kind = file.value(f"{_KEY}model")
    if kind not in ("gpt2", "llama"):
        named = "no tokenizer" if kind is None else f"a tokenizer of the kind {kind!r}"
        raise _unsupported(file, f"has {named} ({_KEY}model), and 'gpt2' and 'llama' are read")
    try:
        tokenizer = _byte_level(file) if kind == "gpt2" else _sentencepiece(file)
        settings = _settings(file)
    except (UnsupportedModelError, CheckpointError):
        raise
    except Exception as error:  # the library raises a bare Exception
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"{file.path} has no tokenizer that can be read: {reason}. "
            "Take the model from another source."
        ) from error
    tokenizer.save(str(folder / DEFINITION))
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2), "utf-8")


def _byte_level(file: GgufFile) -> Tokenizer:
    """Bytes merged to tokens within words, as GPT-2 does."""
    rule = _word_rule(file)
    merges = [tuple(merge.split(" ", 1)) for merge in _required(file, "merges")]
    model = models.BPE(_vocabulary(file), merges, ignore_merges=rule in _WHOLE_WORDS)
    tokenizer = Tokenizer(model)
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    cut: list[Any] = []
    if rule in _SPLITS:
        cut = [pre_tokenizers.Split(Regex(_SPLITS[rule]), behavior="isolated")]
    elif rule == _AT_DIGITS:
        cut = [pre_tokenizers.Digits(individual_digits=True)]
    as_gpt2 = rule not in _SPLITS
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=as_gpt2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, spelled])
    tokenizer.decoder = decoders.ByteLevel()
    return _completed(file, tokenizer, adds_bos=rule in _BEGIN_WITH_BOS)


def _word_rule(file: GgufFile) -> str:
    """The rule that the file names, or the one that all models of its architecture have."""
    named = file.value(f"{_KEY}pre", "")
    if named in _UNNAMED:
        named = _OF_ARCHITECTURE.get(file.architecture, named)
    if named in (*_SPLITS, *_GPT2, _AT_DIGITS):
        return str(named)
    if named in _UNNAMED:
        raise _unsupported(file, f"does not name the rule that cuts text into words ({_KEY}pre)")
    raise _unsupported(file, f"cuts text into words by the rule {named!r}, which is not supported")


def _sentencepiece(file: GgufFile) -> Tokenizer:
    """Pieces with the space before them, merged by their scores, and bytes for the rest."""
    for name, off in _OFF.items():
        value = file.value(f"{_KEY}{name}", off)
        if value != off and value not in ([], b""):
            raise _unsupported(file, f"has the setting {_KEY}{name}, which is not supported")
    vocabulary, kinds = _vocabulary(file), _kinds(file)
    unknown = file.value(
        f"{_KEY}unknown_token_id", kinds.index(_UNKNOWN) if _UNKNOWN in kinds else 0
    )
    model = models.BPE(
        vocabulary,
        _merges_by_score(file, vocabulary),
        unk_token=_required(file, "tokens")[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaced = file.value(f"{_KEY}add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first" if spaced else "never", split=False
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * bool(spaced))
    return _completed(file, tokenizer, adds_bos=True)


def _merges_by_score(file: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, that of the highest score first."""
    scores, kinds = _required(file, "scores"), _kinds(file)
    if len(scores) != len(vocabulary):
        raise ValueError(f"{len(vocabulary)} tokens have {len(scores)} scores")
    pairs = [
        (-scores[i], vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece, cut)
        for piece, i in vocabulary.items()
        if kinds[i] not in (_UNKNOWN, _CONTROL, _BYTE)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return [(piece[:cut], piece[cut:]) for *_, piece, cut in sorted(pairs)]


def _completed(file: GgufFile, tokenizer: Tokenizer, adds_bos: bool) -> Tokenizer:
    """``tokenizer`` with the file's control and other whole tokens, and its start of a text."""
    tokens = _required(file, "tokens")
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, _kinds(file), strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    bos = file.value(f"{_KEY}bos_token_id")
    if bos is not None and file.value(f"{_KEY}add_bos_token", adds_bos):
        tokenizer.post_processor = TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _settings(file: GgufFile) -> dict[str, Any]:
    """The content of a tokenizer_config.json."""
    tokens, settings = _required(file, "tokens"), {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = file.value(f"{_KEY}{key}_token_id")
        if number is not None:
            settings[f"{name}_token"] = tokens[number]
    template = file.value(_TEMPLATE)
    named = {
        key.removeprefix(f"{_TEMPLATE}."): file.value(key) for key in file.keys(f"{_TEMPLATE}.")
    }
    if template is None and named:
        template = default_of(named, file.path)
    if template is not None:
        settings["chat_template"] = template
    return settings


def _vocabulary(file: GgufFile) -> dict[str, int]:
    tokens = _required(file, "tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("two of its tokens are spelled the same")
    return vocabulary


def _kinds(file: GgufFile) -> list[int]:
    return list(_required(file, "token_type"))


def _required(file: GgufFile, name: str) -> list[Any]:
    """A list that every tokenizer of a kind has."""
    found = file.value(_KEY + name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"it has no {_KEY}{name}")
    return found


def _unsupported(file: GgufFile, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{file.path} {what}. Use the model's Hugging Face folder instead."
    )
