from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from sample_rows import row

from nearfar.errors import DocumentError, InvalidOptionError
from nearfar.evaluation.harness.results import Results, read_rows, row_of


def test_a_row_is_its_line() -> None:
    whole = row(details={"error": [[0.5]]}, rates={"2": 3.0}, depth=0.25)
    failed = row(policy="h2o", error="Too little.")
    assert row_of(whole.to_json()) == whole
    assert row_of(failed.to_json()) == failed


def test_rows_are_in_the_file_at_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    rows = [row(case=case) for case in range(3)]
    with Results(path) as results:
        for each in rows:
            results.add(each)
            assert read_rows([path])[-1] == each
    with Results(path) as again:
        assert list(again) == rows
        assert rows[1].key in again
        assert row(case=7).key not in again
        assert again.get(rows[2].key) == rows[2]


@pytest.mark.parametrize("torn", ['{"schema": 1, "key', "\x00\x00", '{"schema": 1}'])
def test_a_line_without_its_end_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "results.jsonl"
    with Results(path) as results:
        results.add(row(case=0))
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    assert read_rows([path]) == [row(case=0)]
    with Results(path) as results:
        assert path.read_bytes() == whole
        results.add(row(case=1))
    assert read_rows([path]) == [row(case=0), row(case=1)]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with (
        Results(path),
        pytest.raises(InvalidOptionError, match=r"Another nearfar is writing .*results\.jsonl"),
        Results(path),
    ):
        pass


@pytest.mark.parametrize("rows", [0, 1])
def test_a_last_line_of_another_hand_stays(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "r.jsonl"
    text = f"{row().to_json()}\n" * rows + "my own note"
    path.write_text(text)
    with pytest.raises(DocumentError, match="nearfar compare did not write"), Results(path):
        pass
    assert path.read_text() == text


def test_merging_takes_the_last_file_and_prefers_results_to_failures(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    failed = row(case=0, error="Too little.")
    cost = row(case=1).cost
    assert cost is not None
    slow = dataclasses.replace(row(case=1), cost=dataclasses.replace(cost, read_seconds=9.0))
    first.write_text("".join(f"{each.to_json()}\n" for each in (failed, row(case=1))))
    second.write_text("".join(f"{each.to_json()}\n" for each in (slow, row(case=0))))
    assert read_rows([first, second]) == [row(case=0), slow]
    assert read_rows([second, first]) == [row(case=1), row(case=0)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("no json", "it is not JSON. Give the results.jsonl that it wrote, or remove the line."),
        ("[]", "not a result of schema 1"),
        ('{"schema": 2}', "not a result of schema 1"),
        ('{"schema": 1, "key": {}}', "missing"),
        ("[" * 100_000, "recursion"),
        (row().to_json().replace('"seed": 0', '"seed": [1]'), "'seed' is [1]"),
        (row().to_json().replace('"case": 0', '"case": "0"'), "'case' is '0'"),
        (row().to_json().replace('"budget": ', '"budget": "a", "unknown": '), "unknown"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f"{row().to_json()}\n{line}\n")
    with pytest.raises(DocumentError) as caught:
        read_rows([path])
    assert str(caught.value).startswith(f"Line 2 of {path} is not a result of nearfar compare: ")
    assert why in str(caught.value)
