from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_folder import make_folder, text_of

from nearfar.errors import InvalidOptionError
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.text.chat import DocumentPrompt
from nearfar.runtime.text.unicode_text import (
    check_unicode,
    shown,
    unicode_fault,
    without_surrogates,
)

HALF = "what \ud83d?"  # of a smiley
BYTE = "caf\udce9"  # what an argument in Latin-1 is to Python
SAID = r"^The text is not valid Unicode: U\+D83D at character 5\. Give it in UTF-8\.$"


def test_what_is_not_valid_is_named() -> None:
    assert unicode_fault("grüße 😀 \x00") is None
    assert unicode_fault(HALF) == "is not valid Unicode: U+D83D at character 5"
    assert unicode_fault(BYTE) == "is not valid Unicode: the byte 0xe9 at character 3"
    check_unicode("世界", "The prompt")
    with pytest.raises(InvalidOptionError) as caught:
        check_unicode(BYTE, "The prompt")
    assert str(caught.value) == (
        "The prompt is not valid Unicode: the byte 0xe9 at character 3. Give it in UTF-8."
    )


def test_what_is_shown_is_valid_and_one_line() -> None:
    assert without_surrogates(BYTE + "\n") == "caf\ufffd\n"
    assert shown(BYTE + "\n\x1b[31m世") == "caf\ufffd\ufffd\ufffd[31m世"


def test_no_door_of_an_engine_lets_it_in(tmp_path: Path) -> None:
    make_folder(tmp_path)
    engine = Engine.from_pretrained(str(tmp_path), dtype="float32", device="cpu", threads=1)
    prompt = DocumentPrompt(engine.tokenizer, text_of(20))
    doors: tuple[Any, ...] = (
        engine.read,
        engine.generate,
        engine.tokenizer.encode,
        prompt.question_ids,
    )
    for act, what in zip(doors, ("text", "text", "text", "question"), strict=True):
        with pytest.raises(
            InvalidOptionError, match=rf"^The {what} is not valid Unicode: U\+D83D at"
        ):
            act(HALF)
    for more in (prompt.extended, prompt.next_question_ids):
        with pytest.raises(InvalidOptionError, match="is not valid Unicode"):
            more(BYTE)
    with pytest.raises(InvalidOptionError, match=SAID):
        engine.generate([HALF, "fine"])
