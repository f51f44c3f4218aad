"""A timeline as a trace for Chrome's and Perfetto's viewers, and as a picture of some layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nearfar.errors import InvalidOptionError
from nearfar.runtime.cache_folder import written_whole
from nearfar.runtime.timeline import Event, Timeline

PICTURE_FORMATS = (".svg", ".png", ".pdf")
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
    """The trace event format: complete events, microseconds, a row for each processor and lane."""
    start = min(event.start_ns for event in timeline.events)
    rows = sorted({(event.processor, event.lane) for event in timeline.events})
    events: list[dict[str, Any]] = [
        {
            "name": "thread_name",
            "ph": "M",
            "pid": 0,
            "tid": rows.index(row),
            "args": {"name": f"{row[0]}, lane {row[1]}"},
        }
        for row in rows
    ]
    events += [
        {
            "name": event.stage,
            "cat": event.processor,
            "ph": "X",
            "pid": 0,
            "tid": rows.index((event.processor, event.lane)),
            "ts": (event.start_ns - start) / 1e3,
            "dur": (event.stop_ns - event.start_ns) / 1e3,
            "args": {"layer": event.layer},
        }
        for event in timeline.events
    ]
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write `chrome_trace` to ``path``, whole or not at all."""
    text = json.dumps(chrome_trace(timeline))
    with written_whole(path, len(text)) as temporary:
        temporary.write_text(text, "utf-8")


def check_picture(path: Path) -> None:
    """Refuse a name whose ending is not a format that pictures have."""
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise InvalidOptionError(
            f"A picture is written as one of {', '.join(PICTURE_FORMATS)}. Got {path.name!r}."
        )


def write_picture(timeline: Timeline, path: Path, title: str) -> None:
    """Draw some layers from the middle of the step, one row for each processor and lane."""
    check_picture(path)
    import matplotlib as mpl  # takes a second

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    shown = _middle(timeline)
    start = min(event.start_ns for event in shown)
    rows = sorted({(event.processor, event.lane) for event in shown})
    figure, axes = pyplot.subplots(figsize=(11, 1.3 + 0.7 * len(rows)), layout="constrained")
    for event in shown:
        place = (event.start_ns - start) / 1e3, (event.stop_ns - event.start_ns) / 1e3
        row = rows.index((event.processor, event.lane))
        colour = COLOURS[event.stage]
        axes.broken_barh([place], (row - 0.4, 0.8), facecolors=colour, edgecolors="white")
    axes.set_yticks(range(len(rows)), [f"{name}, lane {lane}" for name, lane in rows])
    axes.set_xlabel("microseconds")
    axes.set_title(title, fontsize="medium", loc="left")
    used = [stage for stage in COLOURS if any(event.stage == stage for event in shown)]
    patches = [Patch(color=COLOURS[stage]) for stage in used]
    figure.legend(patches, used, ncols=len(used), loc="outside lower center")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    with written_whole(path, 2**20) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
    pyplot.close(figure)


def _middle(timeline: Timeline) -> list[Event]:
    layers = 1 + max(event.layer for event in timeline.events)
    first = max(0, (layers - PICTURE_LAYERS) // 2)
    return [e for e in timeline.events if first <= e.layer < first + PICTURE_LAYERS]
