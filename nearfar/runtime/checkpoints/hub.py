"""Models of the Hugging Face hub, in huggingface_hub's own cache.

The user's settings of huggingface_hub decide access tokens, mirrors, offline mode
(HF_HUB_OFFLINE=1) and the cache folder. Only safetensors are fetched: a pickle can run code.
"""

from __future__ import annotations

import re
from pathlib import Path

from nearfar.errors import DownloadError

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_OTHER_FORMATS = ["*/*"]  # folders hold the same weights for other programs


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form organisation/model."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def snapshot(model: str) -> Path:
    """The folder of the model ``organisation/model``; missing files are fetched."""
    from huggingface_hub import snapshot_download  # half a second that few runs need
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES, ignore_patterns=_OTHER_FORMATS))
    except HFValidationError as error:
        reason = str(error)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    raise DownloadError(
        f"{model} is no folder here, and it could not be fetched from the Hugging Face hub: "
        f"{reason} Check the name and the network; for a gated model accept its licence and log in "
        "(hf auth login); for a machine without network fetch it elsewhere (hf download "
        f"{model}) and give the folder."
    )
