"""Which saved files a document or a conversation takes the place of without a request."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from saved_cases import NINE, QUESTION, tiny_engine
from tiny_folder import text_of

from nearfar.errors import OutputExistsError, OutputNameError, SavedDocumentError
from nearfar.output.place import find_place
from nearfar.results import Turn
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.saved import replacing
from nearfar.runtime.saved.container import Container, Kind, open_container
from nearfar.runtime.saved.document_state import DocumentState, Model
from nearfar.runtime.saved.replacing import (
    check_document,
    conversation_place,
    document_place,
    inputs_digest,
    open_session,
    was_made_from,
)
from nearfar.runtime.saved.write_document import plain
from nearfar.runtime.saved.writing import write_container
from nearfar.runtime.text.text_files import document_text

TEXT = text_of(40, seed=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def saved(base: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TEXT, made from an input of the digest "7"."""
    path = tmp_path_factory.mktemp("saved") / "book.nearfar"
    base.read(document_text(TEXT.encode(), "one.txt")).save(path, made_from="7")
    return path


def held_of(engine: Engine, text: str = TEXT, name: str = "one.txt") -> DocumentState:
    return engine.read(document_text(text.encode(), name))._held


def foreign(path: Path, kind: str = "text") -> Path:
    """A file that is none of ours, or a saved one without a meaning."""
    if kind == "text":
        path.write_bytes(b"a letter")
    else:
        write_container(path, {"kind": kind}, [plain("text", np.zeros(1, np.uint8))])
    return path


def test_inputs_are_known_by_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("a", "link")
    digest = inputs_digest(["a"])
    assert digest == inputs_digest([str(tmp_path / "a")]) == inputs_digest(["link"])
    assert len({digest, inputs_digest(["b"]), inputs_digest(["a", "b"]), inputs_digest([])}) == 4


def test_a_file_tells_what_it_was_made_from(saved: Path, tmp_path: Path) -> None:
    assert was_made_from(saved, "7")
    assert not was_made_from(saved, "6")
    assert not was_made_from(saved, "8")
    assert not was_made_from(foreign(tmp_path / "a"), "7")
    assert not was_made_from(tmp_path / "none", "7")


def test_a_document_takes_the_place_of_its_beginning(base: Engine, saved: Path) -> None:
    for text in (TEXT, TEXT + "\n\nAnd more."):
        assert document_place(saved, held_of(base, text), base.model, False) == saved


def test_a_document_spares_every_other_file(base: Engine, saved: Path, tmp_path: Path) -> None:
    held, other = held_of(base), Model("other", "0" * 64)
    holds = " exists and holds one.txt."
    cases = [
        (saved, held_of(base, "Quite another text."), base.model, holds),
        (saved, held_of(base, TEXT, "two.txt"), base.model, holds),
        (saved, held, other, holds),
        (saved, held_of(base.with_policy("h2o")), base.model, holds),
        (foreign(tmp_path / "letter"), held, base.model, " exists and is not a saved document"),
        (foreign(tmp_path / "none", "document"), held, base.model, " exists and is not a saved"),
    ]
    for path, state, model, text in cases:
        with pytest.raises(OutputExistsError, match=f"^{re.escape(f'{path}{text}')}"):
            document_place(path, state, model, False)
        assert document_place(path, state, model, True) == path


def test_a_document_of_which_every_file_is_its_own(saved: Path, tmp_path: Path) -> None:
    check_document(find_place(saved), lambda _: True)
    check_document(find_place(tmp_path / "new"), lambda _: False)
    with pytest.raises(OutputNameError, match=r"is also an input\."):
        check_document(find_place(saved), lambda _: True, overwrite=True, read=[saved])


def test_an_own_document_that_is_read_only_is_not_said_to_hold_another(
    saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_bytes(saved.read_bytes())
    path.chmod(0o400)
    with pytest.raises(OutputExistsError, match=f"^{re.escape(str(path))} is read-only"):
        check_document(find_place(path), lambda _: True)
    with pytest.raises(OutputExistsError, match=f"^{re.escape(str(path))} exists and holds one"):
        check_document(find_place(path), lambda _: False)


def test_a_document_with_damaged_text_is_spared(
    base: Engine, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, path = held_of(base), tmp_path / "a"
    data = saved.read_bytes()
    at = data.index(TEXT.encode())
    path.write_bytes(data[:at] + b"?" + data[at + 1 :])
    with pytest.raises(OutputExistsError, match="exists and holds one"):
        document_place(path, held, base.model, False)
    monkeypatch.setattr(replacing, "source_names", lambda _: 1 / 0)  # no nonsense: a defect
    with pytest.raises(ZeroDivisionError):
        document_place(path, held, base.model, False)


def test_a_conversation_takes_the_place_of_its_beginning_alone(
    base: Engine, saved: Path, tmp_path: Path
) -> None:
    document, path = base.open(saved), tmp_path / "talk"
    talk = document.conversation()
    turns = [Turn(QUESTION, talk.ask(QUESTION, NINE).text)]
    talk.save(path)
    held, model = document._held, base.model
    for more in ([], [Turn("more?", "no")]):
        assert conversation_place(path, [*turns, *more], held, model, False) == path
    assert conversation_place(tmp_path / "new", turns, held, model, False) == tmp_path / "new"
    of_another = replace(held, prompt=held_of(base, "Quite another text.").prompt)
    cases = [
        (path, [Turn(QUESTION, "other")], held),
        (path, [], held),
        (path, turns, of_another),
        (saved, turns, held),
        (foreign(tmp_path / "letter"), turns, held),
        (foreign(tmp_path / "odd", "conversation"), turns, held),
    ]
    for name, said, state in cases:
        text = re.escape(f"{name} exists and is not an earlier part of this conversation")
        with pytest.raises(OutputExistsError, match=f"^{text}"):
            conversation_place(name, said, state, model, False)
        assert conversation_place(name, said, state, model, True) == name


def test_a_session_begins_or_goes_on(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for path in (tmp_path / "new", empty):
        session = open_session(path, [])
        assert (session.place.path, session.begun) == (path, None)
    begun = open_session(foreign(tmp_path / "talk", "conversation"), []).begun
    assert begun is not None
    assert (begun.about, begun.kind.name) == ({"kind": "conversation"}, "conversation")
    assert not begun.file.closed
    begun.close()


def test_a_session_is_kept_in_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Container] = []

    def kept(path: Path, kind: Kind) -> Container:
        files.append(open_container(path, kind))
        return files[0]

    monkeypatch.setattr(replacing, "open_container", kept)
    cases = {
        foreign(tmp_path / "letter"): "exists and is not an earlier part of this conversation.",
        foreign(tmp_path / "book", "document"): "is a document and not a conversation.",
    }
    for path, text in cases.items():
        said = f"{path} {text} Name another file for the conversation."
        with pytest.raises(OutputNameError, match=f"^{re.escape(said)}$"):
            open_session(path, [])
    assert [each.file.closed for each in files] == [True]
    with pytest.raises(OutputNameError, match="is also an input"):
        open_session(tmp_path / "book", [tmp_path / "book"])
    (tmp_path / "cut").write_bytes((tmp_path / "book").read_bytes()[:-1])
    with pytest.raises(SavedDocumentError, match="Name another file to begin a new conversation"):
        open_session(tmp_path / "cut", [])
