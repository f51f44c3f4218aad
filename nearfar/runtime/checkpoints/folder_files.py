"""The files of a folder in the Hugging Face layout: which are weights, and whether all exist.

Errors name a broken link, a pointer of Git LFS in place of a file, an adapter, or the format of
another tool. Only files that the index names belong to the model. This module reads JSON and the
first bytes of other files; it knows nothing of tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nearfar.config import counted
from nearfar.errors import CheckpointError, UnsupportedModelError
from nearfar.runtime.checkpoints.foreign_quantisation import quantised_by_files

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_LFS = b"version https://git-lfs"
# the same weights in other types or for other programs
_OTHER_COPIES = re.compile(r"^(consolidated.*|model\.[a-z0-9]+)\.safetensors$")
# what is read of a folder, with weights and old vocabularies
_READ = re.compile(
    r"^((config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|"
    r"chat_template|model\.safetensors\.index)\.json|merges\.txt|.*\.(safetensors|model|jinja))$"
)


def check_folder(folder: Path) -> None:
    """Raise CheckpointError unless the file names of ``folder`` are those of a complete model."""
    if not folder.is_dir():
        raise CheckpointError(
            f"A model is a folder with {CONFIG} and safetensors files. {folder} is no folder."
        )
    check_whole(file for file in sorted(folder.iterdir()) if _READ.match(file.name))
    if adapter := next((name for name in _ADAPTERS if (folder / name).is_file()), None):
        raise _is_adapter(folder, adapter)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}. Give the folder of a model in the Hugging Face layout."
        )


def check_whole(files: Iterable[Path]) -> None:
    """Raise CheckpointError for a link to nothing and for a pointer of Git LFS."""
    for file in files:
        if file.is_symlink() and not file.exists():
            raise CheckpointError(
                f"{file} is a link to {file.readlink()}, which is not there: the download was not "
                "finished, or its cache was cleared in part. Download the model again."
            )
        if file.is_dir():
            raise CheckpointError(
                f"{file} is a folder, and a file of the model should be there. Download the model "
                "again."
            )
        if file.is_file() and _is_pointer(file):
            raise CheckpointError(
                f"{file} is not the file itself but a pointer to it, left by Git LFS. "
                "Fetch the content with 'git lfs pull', or download the model again."
            )


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_LFS)) == _LFS


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, with or without a byte order mark; CheckpointError otherwise."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise _no_json(path, error) from error
    if not text.strip():
        raise CheckpointError(f"{path} is empty. Download the file again.")
    return json_object(text, path)


def json_object(text: str, path: Path) -> dict[str, Any]:
    """The JSON object that ``text``, the content of ``path``, is; CheckpointError otherwise."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object. Got a {type(content).__name__}. "
            "Download the file again."
        )
    return content


def _no_json(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not valid JSON ({error}). Download the file again.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder``: one, or the shards that its index names.

    Raises CheckpointError if some are missing or others are beside them, and UnsupportedModelError
    if they are of another tool.
    """
    if found := quantised_by_files(folder):
        raise quantised(folder, *found)
    single = folder / SINGLE
    files = [single] if single.is_file() else _shards(folder)
    names = {file.name for file in files}
    others = [
        file.name
        for file in sorted(folder.glob("*.safetensors"))
        if file.name not in names and not _OTHER_COPIES.match(file.name)
    ]
    if others:
        raise CheckpointError(
            f"{folder} has weights that do not belong to {SINGLE if single in files else INDEX}: "
            f"{', '.join(others)}. Move them out of the folder, or download the model again."
        )
    return files


def quantised(folder: Path, tool: str, shown_by: str) -> UnsupportedModelError:
    """The error that another tool quantised ``folder``."""
    return UnsupportedModelError(
        f"{folder} is quantised ({tool}, by {shown_by}), which is not read. Take the model's "
        "weights in float32, bfloat16 or float16, or a GGUF file of it."
    )


def _shards(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{folder / INDEX} has no 'weight_map'. Download the file again.")
    for tensor, name in shards.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{folder / INDEX} must give for every tensor a file of its own folder. "
                f"Got {name!r} for {tensor!r}. Download the file again."
            )
    files = [folder / name for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {counted(len(files), 'weight file')} that {INDEX} "
            f"names: {', '.join(missing)}. Download the model again."
        )
    return files


def _no_weights(folder: Path) -> CheckpointError:
    for pattern in ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth"):
        if pickled := sorted(file.name for file in folder.glob(pattern)):
            return CheckpointError(
                f"{folder} has its weights only as {pickled[0]}, a pickle, which is not read. "
                "Convert them: load the model with transformers and call save_pretrained."
            )
    if others := sorted(file.name for file in folder.glob("*.safetensors")):
        named = re.search("gptq|awq|bit|exl|fp8|int8", others[0], re.IGNORECASE)
        reason = ", by its name weights that another tool quantised" if named else ""
        return CheckpointError(
            f"{folder} has {others[0]}{reason}, but neither {SINGLE} nor {INDEX}. Take the model's "
            f"weights as transformers saves them; if this file has them, name it {SINGLE}."
        )
    if found := sorted(file.name for file in folder.glob("*.gguf")):
        return CheckpointError(
            f"{folder} has its weights as GGUF. Give the file itself: {folder / found[0]}."
        )
    return CheckpointError(
        f"{folder} has no weights: expected {SINGLE} or {INDEX}. Download the model again."
    )


def _is_adapter(folder: Path, name: str) -> CheckpointError:
    try:
        described = read_json(folder / _ADAPTERS[0]).get("base_model_name_or_path")
    except (OSError, CheckpointError):
        described = None
    base = f" for {described}" if described else ""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return CheckpointError(
            f"{folder} has an adapter{base} ({name}) beside the model, and adapters are not "
            "applied. Merge it (merge_and_unload of peft, then save_pretrained), or move it out of "
            "the folder to use the model without it."
        )
    return CheckpointError(
        f"{folder} holds an adapter{base} ({name}), not a whole model, and adapters are not "
        "applied. Merge it into its base (merge_and_unload of peft, then save_pretrained) and give "
        "that folder."
    )
