from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.errors import InvalidOptionError
from nearfar.evaluation.timeline_files import check_picture, write_picture, write_trace
from nearfar.runtime.steps.timeline import STAGES, Timeline, timeline_of


def a_timeline(layers: int = 5) -> Timeline:
    step = 10_000
    gpu = [step * i for i in range(3 + layers * len(STAGES))]
    first = [gpu[2 + layer * len(STAGES) + 1] for layer in range(layers)]
    host = [(start + 2_000, start + 15_000) for start in first]
    return timeline_of([gpu], [host], layers)


def test_a_trace_has_every_stage_on_the_row_of_its_processor(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(a_timeline(), path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert sorted(names.values()) == ["GPU, micro-batch 0", "host, micro-batch 0"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 2 + 5 * len(STAGES) + 5
    assert min(e["ts"] for e in spans) == 0
    far = [e for e in spans if e["name"] == "attend_far"]
    assert {names[e["tid"]] for e in far} == {"host, micro-batch 0"}
    assert [e["args"]["layer"] for e in far] == [0, 1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_a_picture_is_drawn(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"step.{ending}"
    write_picture(a_timeline(), path, "A title")
    start = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    if ending == "svg":
        text = path.read_text()
        assert all(stage in text for stage in ("attend_far", "attend_near", "finish_layer"))


def test_other_endings_are_refused() -> None:
    with pytest.raises(InvalidOptionError) as caught:
        check_picture(Path("step.gif"))
    assert str(caught.value) == ("A picture is written as one of .svg, .png, .pdf. Got 'step.gif'.")
