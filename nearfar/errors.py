"""What can go wrong, as one tree.

    NearfarError                     exit code 1
    ├── InvalidOptionError           exit code 2: a value the user typed cannot be used
    │   └── UnknownNameError         ... and a known name is near it
    ├── InputNameError               exit code 2: what is named is not there, or may not be opened
    ├── DocumentError                a document that cannot be read
    │   ├── DocumentNameError        ... because of its name: an InputNameError too
    │   ├── ContextTooLongError      ... or that is longer than the model reads
    │   └── SavedDocumentError       ... or that was saved and cannot be used here, or not be saved
    │       ├── SavedNameError       ... because of its name: an InputNameError too
    │       ├── DamagedDocumentError ... because it is not as it was written
    │       └── DocumentVersionError ... because another version of nearfar wrote it
    ├── ModelError                   a model that cannot be loaded
    │   ├── UnsupportedModelError    ... because its architecture is not known here
    │   ├── CheckpointError          ... because its files are missing, truncated or corrupt
    │   │   └── ModelNameError       ... because of its name: an InputNameError too
    │   └── DownloadError            ... because it could not be fetched
    │       └── ChecksumError        ... or what came was not what was expected
    ├── OutputError                  a file that cannot be written
    │   └── OutputNameError          exit code 2: its name cannot be used, known before the work
    │       └── OutputExistsError    ... because a file is there and must not be replaced
    ├── OutOfMemoryError             a plan or an allocation that does not fit
    ├── EndedAnswerError             an answer that was cut off has no result
    ├── ForkedProcessError           an engine in a process forked from one that had used one
    └── DeviceError                  a GPU that fails, is lost or stops answering

Every message says what was expected, what was seen and what to do, so the text is part of the
product: tests compare it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NearfarError(Exception):
    """Base of every error that a user can act on, not a defect."""

    exit_code = 1


class InvalidOptionError(NearfarError):
    """An option has a value outside its rule."""

    exit_code = 2


class UnknownNameError(InvalidOptionError):
    """A name is not registered; the nearest known one is offered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.65)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


class InputNameError(NearfarError):
    """A named input is missing or may not be opened: another name is needed."""

    exit_code = 2


class DocumentError(NearfarError):
    """A document is missing, empty, binary or not decodable."""


class DocumentNameError(InputNameError, DocumentError):
    """A file to read is missing, or may not be opened."""


class DocumentWarning(UserWarning):
    """A part of a document cannot be read; the rest was read."""


class ContextTooLongError(DocumentError):
    """More tokens were given than the model can read."""


class SavedDocumentError(DocumentError):
    """A saved document is invalid, is of another model or policy, or cannot be written."""


class SavedNameError(InputNameError, SavedDocumentError):
    """A saved document is not there, or may not be opened."""


class DamagedDocumentError(SavedDocumentError):
    """The bytes of a saved document differ from the written ones."""


class DocumentVersionError(SavedDocumentError):
    """A saved document has another version of the format, ``version``."""

    def __init__(self, message: str, version: int) -> None:
        super().__init__(message)
        self.version = version


class ModelError(NearfarError):
    """A model cannot be loaded."""


class UnsupportedModelError(ModelError):
    """The architecture, or a feature of it, is not implemented."""


class CheckpointError(ModelError):
    """A checkpoint file is missing, truncated or corrupt."""


class ModelNameError(InputNameError, CheckpointError):
    """The folder or file of a model is not there."""


class DownloadError(ModelError):
    """A file could not be fetched."""


class ChecksumError(DownloadError):
    """A file's sha256 is not the expected one."""


class OutputError(NearfarError):
    """A file cannot be written."""


class OutputNameError(OutputError):
    """Nothing can be written under a name."""

    exit_code = 2


class OutputExistsError(OutputNameError):
    """A file exists, and is replaced only on request."""

    def __init__(self, name: str, reason: str) -> None:
        self.state = f"{name} {reason}."
        super().__init__(f"{self.state} Name another file, or replace it: overwrite=True.")


class OutOfMemoryError(NearfarError):
    """A plan or an allocation exceeds near or far memory."""


class EndedAnswerError(NearfarError, RuntimeError):
    """An answer ended early: interrupted, closed, or another question was asked."""


class ForkedProcessError(NearfarError):
    """The process was forked from one that had computed, so it cannot compute."""


class DeviceError(NearfarError):
    """A GPU fails, is lost, or stops answering."""
