"""Token ids that a model has no embedding for: words of a tokenizer that outgrew its model."""

from __future__ import annotations

from collections.abc import Sequence

from nearfar.errors import CheckpointError
from nearfar.runtime.text.tokenizer import Tokenizer


def check_token_ids(ids: Sequence[int], rows: int, tokenizer: Tokenizer | None = None) -> None:
    """Raise CheckpointError unless every one of ``ids`` has one of the embedding's ``rows``.

    With the ``tokenizer``, the word is named.
    """
    beyond = next((i for i in ids if not 0 <= i < rows), None)
    if beyond is None:
        return
    word = ""
    if tokenizer is not None and beyond >= rows:
        word = f" ({tokenizer.decode([beyond], skip_special_tokens=False)!r})"
    raise CheckpointError(
        f"The text has the token {beyond}{word}, and the model's embedding has rows for tokens 0 "
        f"to {rows - 1}: the tokenizer has words that the weights were not trained for. Take "
        "tokenizer and weights from the same model, or leave this word out of the text."
    )
