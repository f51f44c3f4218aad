"""Documents that are saved and opened: the same answers, under every policy that can have them."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_cases import NINE, QUESTION, TEXT, SavedBytes, tiny_engine
from specs import LSH, representatives
from tiny_folder import make_folder, text_of

from nearfar.config import SamplingConfig
from nearfar.errors import (
    ContextTooLongError,
    DamagedDocumentError,
    DocumentError,
    OutOfMemoryError,
    OutputNameError,
    SavedDocumentError,
)
from nearfar.policies.registry import create_policy, policy_names
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.saved.opened import open_facts
from nearfar.runtime.saved.rows import MappedRows

SPECS = representatives(policy_names())
KEEPING = [spec for spec in SPECS if create_policy(spec).traits.kind != "evicts"]
EVICTING = [spec for spec in SPECS if spec not in KEEPING]
LONG = SamplingConfig(max_new_tokens=70)  # tokens leave the window
WARM = SamplingConfig(max_new_tokens=20, temperature=1.2, seed=6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def saved(base: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TEXT under the default policy."""
    path = tmp_path_factory.mktemp("saved") / "book.nearfar"
    base.read(TEXT).save(path)
    return path


def ids(document: Any, sampling: SamplingConfig = NINE, **how: Any) -> tuple[int, ...]:
    answer: tuple[int, ...] = document.ask(QUESTION, sampling, **how).token_ids
    return answer


@pytest.mark.parametrize("spec", SPECS)
def test_a_reopened_document_answers_token_for_token(
    base: Engine, tmp_path: Path, spec: str
) -> None:
    engine = base.with_policy(spec)
    document = engine.read(TEXT)
    document.save(tmp_path / "a")
    opened = engine.open(tmp_path / "a")
    for sampling in (NINE, LONG, WARM):
        assert ids(opened, sampling) == ids(document, sampling)
    assert ids(opened, reading="policy") == ids(document, reading="policy")
    assert opened.tokens == document.tokens
    assert opened.prefill_seconds == document.prefill_seconds > 0
    assert (document.was_opened, opened.was_opened) == (False, True)
    want, got = document.memory_report(), opened.memory_report()
    assert (got.near_bytes, got.far_bytes) == (want.near_bytes, want.far_bytes)


@pytest.mark.parametrize(
    ("reader", "asker"),
    sorted({(a, b) for a in KEEPING for b in KEEPING if "sketch" in (a, b) or "full" in (a, b)}),
)
def test_a_document_is_asked_under_another_policy(
    base: Engine, tmp_path: Path, reader: str, asker: str
) -> None:
    base.with_policy(reader).read(TEXT).save(tmp_path / "a")
    engine = base.with_policy(asker)
    assert ids(engine.open(tmp_path / "a"), LONG) == ids(engine.read(TEXT), LONG)


@pytest.mark.parametrize("far_dtype", ["bfloat16", "float16", "int8", "int4", "kivi-4", "kivi-2"])
@pytest.mark.parametrize("asker", ["sketch", "full-far"])
def test_every_type_of_rows(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, far_dtype: str, asker: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "wide"
    if not folder.exists():
        folder.mkdir()
        make_folder(folder, context=3000, head_dim=32)
    engine = tiny_engine(folder, far_dtype=far_dtype, policy=asker)
    document = engine.read(TEXT)
    document.save(tmp_path / "a")
    # the type of the rows is the file's, whatever the engine would choose
    other = engine.with_config(engine.config.replace(far_dtype="float32", sinks=9, window=2))
    assert ids(other.open(tmp_path / "a"), LONG) == ids(document, LONG)
    everything_near = engine.with_policy("full").open(tmp_path / "a")
    assert everything_near.memory_report().far_bytes == 0
    assert len(ids(everything_near)) == 9


@pytest.mark.parametrize("spec", EVICTING)
def test_what_an_evicting_policy_kept_is_for_that_policy(
    base: Engine, tmp_path: Path, spec: str
) -> None:
    engine = base.with_policy(spec)
    engine.read(TEXT).save(tmp_path / "a")
    name = re.escape(
        f"{tmp_path / 'a'} holds what {spec.partition(':')[0]} with a budget of 16 kept"
    )
    for other in ("sketch", "full"):
        with pytest.raises(SavedDocumentError, match=f"^{name}, and {other} .* needs all keys"):
            base.with_policy(other).open(tmp_path / "a")
    larger = engine.with_config(engine.config.replace(budget=17))
    with pytest.raises(SavedDocumentError, match=r"17 needs to choose its own while reading\. Ask"):
        larger.open(tmp_path / "a")


def test_all_keys_are_not_for_an_evicting_policy(base: Engine, saved: Path) -> None:
    with pytest.raises(SavedDocumentError, match="holds all keys of the document, and h2o with"):
        base.with_policy("h2o").open(saved)


@pytest.mark.parametrize("length", [1, 2, 5, 11, 12, 13, 14, 30])
@pytest.mark.parametrize("spec", ["sketch", "full", "h2o", LSH])
def test_documents_about_as_long_as_sinks_and_window(
    base: Engine, tmp_path: Path, length: int, spec: str
) -> None:
    engine = base.with_policy(spec)
    document = engine.read(text_of(length))
    document.save(tmp_path / "a")
    assert ids(engine.open(tmp_path / "a"), LONG) == ids(document, LONG)


def test_a_file_is_little_more_than_what_is_held(base: Engine, tmp_path: Path) -> None:
    document = base.read(text_of(2500))
    document.save(tmp_path / "a")
    report = document.memory_report()
    overhead = 7 * 4096 * 3  # pages that are begun: 3 layers of rows, 4 arrays of the index, texts
    held = report.far_bytes + report.index_bytes + report.near_bytes
    assert (tmp_path / "a").stat().st_size <= 1.05 * held + overhead + 20 * document.tokens


def test_an_index_is_taken_from_the_file(
    base: Engine, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = base.with_policy(LSH)
    made = tables.open(saved)
    assert made.index_is_new
    assert not base.open(saved).index_is_new
    made.save(tmp_path / "both")

    def refuse(*_: Any) -> None:
        raise AssertionError("the index was made again")

    for name in ("lsh.sketch.LayerSketch.extend", "policies.lsh_tables.extend_tables"):
        monkeypatch.setattr(f"nearfar.{name}", refuse)
    for engine in (base, tables):
        document = engine.open(tmp_path / "both")
        assert not document.index_is_new
        assert document.memory_report().index_bytes > 0
    with pytest.raises(AssertionError):
        base.with_policy("lsh-tables:num_tables=21").open(tmp_path / "both")
    with pytest.raises(AssertionError):
        base.with_policy("sketch:bits=2").open(tmp_path / "both")
    seeded = tables.with_config(tables.config.replace(seed=5))
    with pytest.raises(AssertionError):
        seeded.open(tmp_path / "both")
    base.with_config(base.config.replace(seed=5, budget=30)).open(tmp_path / "both")


def test_saving_over_the_file_that_is_open(base: Engine, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(saved.read_bytes())
    document = base.with_policy(LSH).open(path)
    want = ids(document)
    document.save(path)
    document.save(path)
    assert ids(document) == ids(base.with_policy(LSH).open(path)) == want


def test_extended_documents(base: Engine, tmp_path: Path) -> None:
    """What is read behind is read as if it had always been there."""
    more = text_of(150, seed=3)
    for spec in ("sketch", "full-far", "full"):
        engine = base.with_policy(spec)
        document = engine.read(TEXT)
        document.save(tmp_path / "a")
        whole = engine.read(f"{TEXT}\n\n{more}")
        opened = engine.open(tmp_path / "a")
        for each in (document, opened):
            each.extend(f" {more}\n")
            assert each.tokens == whole.tokens
        assert not opened.was_opened
        assert ids(document, LONG) == ids(opened, LONG)
        # codes are centred on the mean of what was read first, so others may be drawn
        assert ids(document, LONG) == ids(whole, LONG) or not spec.startswith("full")
        opened.save(tmp_path / "b")
        again = engine.open(tmp_path / "b")
        assert ids(again, LONG) == ids(document, LONG)
        assert again._held.prompt.text == whole._held.prompt.text
        assert (again._held.prompt.spans == whole._held.prompt.spans).all()
        assert again.prefill_seconds > opened._held.read_seconds / 2


def test_extending_too_far_leaves_the_document_as_it_was(base: Engine, saved: Path) -> None:
    document = base.open(saved)
    want, tokens = ids(document), document.tokens
    with pytest.raises(ContextTooLongError, match="and the model reads at most 3000"):
        document.extend(text_of(3000))
    with pytest.raises(DocumentError, match=r"^There is no text to read behind the document"):
        document.extend(" \n")
    assert (ids(document), document.tokens) == (want, tokens)


def test_rows_that_come_later_are_charged_and_those_of_the_file_are_not(
    base: Engine, saved: Path
) -> None:
    block_bytes = 3 * 256 * 2 * 2 * 6 * 4  # all layers
    engine = base.with_config(base.config.replace(far_memory_bytes=2 * block_bytes))
    document = engine.open(saved)
    assert engine._ledger.used_bytes == 0
    assert document.memory_report().far_bytes > 0
    before = saved.read_bytes()
    document.extend(text_of(200))
    assert engine._ledger.used_bytes == block_bytes
    with pytest.raises(OutOfMemoryError, match=r"^Not enough far memory: "):
        document.extend(text_of(1000))
    del document
    gc.collect()
    assert engine._ledger.used_bytes == 0
    assert saved.read_bytes() == before


def test_another_model_is_refused(base: Engine, saved: Path, tmp_path: Path) -> None:
    make_folder(tmp_path, context=3000, initializer_range=0.5, rms_norm_eps=1e-3)
    other = tiny_engine(tmp_path)
    message = (
        f"{saved} was read by another model, {base.model_name}, than {tmp_path}: they differ in "
        "weights or configuration. Ask it with the model that read it (--model), or index the "
        "document again."
    )
    with pytest.raises(SavedDocumentError, match=f"^{re.escape(message)}$"):
        other.open(saved)


def test_another_tokenizer_is_good_enough_if_it_makes_the_same_tokens(
    base: Engine, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of earlier versions, which described tokenizers otherwise, still open."""
    want = base.open(saved).ask(QUESTION, NINE)
    monkeypatch.setattr(base.tokenizer, "identity", "0" * 64)
    document = base.open(saved)
    assert document.ask(QUESTION, NINE).token_ids == want.token_ids
    monkeypatch.setattr(base.tokenizer, "opening_ids", [7])
    with pytest.raises(SavedDocumentError, match="with another tokenizer or chat template"):
        base.open(saved)


@pytest.mark.parametrize("spec", ["sketch", "topk-oracle", "full-far", "full"])
@pytest.mark.parametrize("reading", ["exact", "policy"])
def test_a_damaged_row_never_enters_an_answer(
    base: Engine, saved: Path, tmp_path: Path, spec: str, reading: str
) -> None:
    whole = SavedBytes(saved.read_bytes())
    place = whole.layout.places["rows.1"]
    # a block that an oracle does not read for certain: at least one that all others do
    whole.data[place.offset + place.stride + 300 * place.section.shape[2] + 5] ^= 1
    path = tmp_path / "a"
    path.write_bytes(whole.data)
    with pytest.raises(DamagedDocumentError, match=r"damaged: section 'rows\.1' differs at byte"):
        ids(base.with_policy(spec).open(path), LONG, reading=reading)
    with pytest.raises(DamagedDocumentError):
        base.with_policy(spec).open(path).save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["text", "tokens", "spans", "near", "index.0.0.words"])
def test_everything_but_rows_is_looked_at_when_it_is_opened(
    base: Engine, saved: Path, tmp_path: Path, name: str
) -> None:
    whole = SavedBytes(saved.read_bytes())
    whole.data[whole.section(name).start + 3] ^= 64
    (tmp_path / "a").write_bytes(whole.data)
    message = re.escape(f"{tmp_path / 'a'} is damaged: section {name!r} differs at byte ")
    with pytest.raises(DamagedDocumentError, match=f"^{message}"):
        base.open(tmp_path / "a")


def test_opening_reads_no_rows(base: Engine, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = MappedRows._is_whole

    def look(self: MappedRows, layer: int, head: int, block: int) -> bool:
        looked.append(layer)
        return real(self, layer, head, block)

    monkeypatch.setattr(MappedRows, "_is_whole", look)
    document = base.open(saved)
    assert looked == []
    ids(document)
    assert set(looked) == {0, 1, 2}
    blocks = -(-(document.tokens - 12) // 256)
    assert len(looked) == 3 * 2 * blocks
    ids(document)
    assert len(looked) == 3 * 2 * blocks


def test_tokens_that_are_not_the_models(base: Engine, saved: Path, tmp_path: Path) -> None:
    whole = SavedBytes(saved.read_bytes())
    whole.set("tokens", np.full(whole.layout.places["tokens"].section.shape, 10**6, np.int32))
    (tmp_path / "a").write_bytes(whole.repaired())
    with pytest.raises(DamagedDocumentError, match=r"not valid \(a token is not in the vocabulary"):
        base.open(tmp_path / "a")


def test_weights_without_a_source_are_hashed(base: Engine, saved: Path) -> None:
    decoder, tokenizer = base.decoder, base.tokenizer
    engine = Engine("by hand", decoder, tokenizer, base.config)
    assert engine.model.identity == Engine("x", decoder, tokenizer, base.config).model.identity
    with pytest.raises(SavedDocumentError, match="was read by another model"):
        engine.open(saved)
    with torch.no_grad():
        decoder.norm[0] += 1
    try:
        changed = Engine("by hand", decoder, tokenizer, base.config)
        assert changed.model.identity != engine.model.identity
    finally:
        with torch.no_grad():
            decoder.norm[0] -= 1


def test_a_stream_ends_when_the_document_is_saved(base: Engine, tmp_path: Path) -> None:
    document = base.read(TEXT)
    want = ids(document)
    stream = document.stream(QUESTION, NINE)
    next(stream)
    document.save(tmp_path / "a")
    with pytest.raises(RuntimeError, match="ended when the document was asked again"):
        next(stream)
    assert ids(document) == ids(base.open(tmp_path / "a")) == want


def test_saving_where_it_cannot_be(base: Engine, saved: Path, tmp_path: Path) -> None:
    document = base.open(saved)
    message = re.escape(f"The folder of {str(tmp_path / 'no' / 'a')!r} does not exist. Make it")
    with pytest.raises(OutputNameError, match=f"^{message}"):
        document.save(tmp_path / "no" / "a")
    with pytest.raises(OutputNameError, match="is a folder"):
        document.save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_file_has_one_index_of_each_kind(base: Engine, saved: Path, tmp_path: Path) -> None:
    kinds = {"sketch": ["sketch"], LSH: ["sketch", "lsh-tables"], "full": ["sketch"]}
    for policy, wanted in kinds.items():
        path = tmp_path / policy.partition(":")[0]
        base.with_policy(policy).open(saved).save(path)
        with open_facts(path) as opened:
            assert [form["index"] for form in opened.facts.indexes] == wanted
