"""A timeline as a trace for Chrome's and Perfetto's viewers, and as a picture of some layers."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from nearfar.errors import InvalidOptionError
from nearfar.output.place import Place, check_replaced, find_place, starts_with
from nearfar.output.whole import write_output
from nearfar.runtime.steps.timeline import Event, Timeline

CREATOR = "nearfar bench"  # as files name it, to be known by
_STARTS = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}
PICTURE_FORMATS = tuple(_STARTS)
PICTURE_LAYERS = 3
# colours that those who see few still tell apart (Okabe and Ito, 2008)
COLOURS = {
    "embed": "#999999",
    "project": "#56B4E9",
    "select": "#E69F00",
    "attend_near": "#009E73",
    "fetch": "#F0E442",
    "wait": "#DDDDDD",
    "merge": "#CC79A7",
    "finish_layer": "#0072B2",
    "attend_far": "#D55E00",
    "logits": "#999999",
}


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace event format, in microseconds: a row for each processor and micro-batch."""
    start = min(event.start_ns for event in timeline.events)
    rows = sorted({(event.processor, event.micro_batch) for event in timeline.events})
    events: list[dict[str, Any]] = [
        {
            "name": "thread_name",
            "ph": "M",
            "pid": 0,
            "tid": rows.index(row),
            "args": {"name": f"{row[0]}, micro-batch {row[1]}"},
        }
        for row in rows
    ]
    events += [
        {
            "name": event.stage,
            "cat": event.processor,
            "ph": "X",
            "pid": 0,
            "tid": rows.index((event.processor, event.micro_batch)),
            "ts": (event.start_ns - start) / 1e3,
            "dur": (event.stop_ns - event.start_ns) / 1e3,
            "args": {"layer": event.layer},
        }
        for event in timeline.events
    ]
    return {"otherData": {"creator": CREATOR}, "traceEvents": events, "displayTimeUnit": "ns"}


def trace_place(path: str | Path, *, overwrite: bool = False) -> Place:
    """The path of a trace; OutputNameError for another kind of file."""
    place = find_place(path, may_stream=True)
    start = json.dumps({"otherData": {"creator": CREATOR}})[:-1].encode()
    kind = "a trace that nearfar made"
    check_replaced(place, kind, lambda path: starts_with(path, start), overwrite=overwrite)
    return place


def write_trace(timeline: Timeline, path: str | Path, *, overwrite: bool = False) -> None:
    """Write `chrome_trace` to ``path``, whole or not at all.

    A file that is there is replaced if it is such a trace, or with ``overwrite``.
    """
    place = trace_place(path, overwrite=overwrite)
    write_output(place, json.dumps(chrome_trace(timeline)).encode())


def picture_place(path: str | Path, *, overwrite: bool = False) -> Place:
    """The path of a picture; OutputNameError for another ending or another kind of file."""
    check_picture(Path(path))
    start = _STARTS[Path(path).suffix.lower()]

    def is_own(there: Path) -> bool:
        return starts_with(there, start, CREATOR.encode())

    place = find_place(path, may_stream=True)
    check_replaced(place, "a picture that nearfar made", is_own, overwrite=overwrite)
    return place


def check_picture(path: Path) -> None:
    """Refuse a name whose ending is not a format of pictures."""
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise InvalidOptionError(
            f"A picture is written as one of {', '.join(PICTURE_FORMATS)}. Got {path.name!r}."
        )


def write_picture(
    timeline: Timeline, path: str | Path, title: str, *, overwrite: bool = False
) -> None:
    """Draw some layers from the middle of the step, one row for each processor and micro-batch.

    A file that is there is replaced if it is such a picture, or with ``overwrite``.
    """
    place = picture_place(path, overwrite=overwrite)
    import matplotlib as mpl  # takes a second

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    shown = _middle(timeline)
    start = min(event.start_ns for event in shown)
    rows = sorted({(event.processor, event.micro_batch) for event in shown})
    figure, axes = pyplot.subplots(figsize=(11, 1.3 + 0.7 * len(rows)), layout="constrained")
    for event in shown:
        span = (event.start_ns - start) / 1e3, (event.stop_ns - event.start_ns) / 1e3
        row = rows.index((event.processor, event.micro_batch))
        colour = COLOURS[event.stage]
        axes.broken_barh([span], (row - 0.4, 0.8), facecolors=colour, edgecolors="white")
    axes.set_yticks(
        range(len(rows)), [f"{name}, micro-batch {micro_batch}" for name, micro_batch in rows]
    )
    axes.set_xlabel("microseconds")
    axes.set_title(title, fontsize="medium", loc="left")
    used = [stage for stage in COLOURS if any(event.stage == stage for event in shown)]
    patches = [Patch(color=COLOURS[stage]) for stage in used]
    figure.legend(patches, used, ncols=len(used), loc="outside lower center")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    drawn, form = BytesIO(), Path(path).suffix[1:].lower()
    creator = {"Software" if form == "png" else "Creator": CREATOR}
    figure.savefig(drawn, format=form, dpi=150, metadata=creator)
    pyplot.close(figure)
    write_output(place, drawn.getvalue())


def _middle(timeline: Timeline) -> list[Event]:
    layers = 1 + max(event.layer for event in timeline.events)
    first = max(0, (layers - PICTURE_LAYERS) // 2)
    return [e for e in timeline.events if first <= e.layer < first + PICTURE_LAYERS]
