"""When each stage of one decode step ran, on the GPU and on the host, by one clock.

This module does not measure. Times are nanoseconds of the host's monotonic clock.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median

# in the order of a layer; during `wait` the micro-batch's stream is idle
STAGES = ("project", "select", "attend_near", "fetch", "wait", "merge", "finish_layer")
HOST_STAGE = "attend_far"


@dataclass(frozen=True)
class Event:
    """One stage of one layer; layer -1 means before the first or after the last layer."""

    stage: str
    processor: str  # GPU or host
    micro_batch: int
    layer: int
    start_ns: int
    stop_ns: int

    @property
    def seconds(self) -> float:
        """The duration."""
        return (self.stop_ns - self.start_ns) / 1e9


@dataclass(frozen=True)
class Timeline:
    """All events of a step."""

    events: tuple[Event, ...]

    def seconds_by_stage(self) -> dict[str, float]:
        """Seconds of a step in each stage of GPU and host, summed over micro-batches."""
        found: dict[str, float] = defaultdict(float)
        for event in self.events:
            found[event.stage] += event.seconds
        return dict(found)

    def handoff_seconds(self) -> float | None:
        """Median time of a layer's round trip to the host, less the time of attention.

        The round trip is from the end of the selection to the end of the wait. The host's attention
        and the GPU's (attend_near and fetch) run at the same time; the longer one is subtracted.
        None if nothing is far.
        """
        by_layer: dict[tuple[int, int], dict[str, Event]] = defaultdict(dict)
        for event in self.events:
            by_layer[event.micro_batch, event.layer][event.stage] = event
        costs = []
        for stages in by_layer.values():
            if HOST_STAGE in stages:
                span = (stages["wait"].stop_ns - stages["select"].stop_ns) / 1e9
                near = stages["attend_near"].seconds + stages["fetch"].seconds
                costs.append(span - max(stages[HOST_STAGE].seconds, near))
        return median(costs) if costs else None


def timeline_of(times: list[list[int]], host: list[list[tuple[int, int]]], layers: int) -> Timeline:
    """A timeline from stamps: ``times`` by the GPU's clock, ``host`` by the host's clock.

    The stamps of a micro-batch are taken at the start, after the embedding, after each stage of
    each layer and after the logits. The host's stamps are taken when it sees a layer's request and
    when it answers.
    """
    offset = _clock_offset(times, host)
    events = []
    for micro_batch, stamps in enumerate(times):
        places = [stamp + offset for stamp in stamps]
        names = [("embed", -1), *((s, n) for n in range(layers) for s in STAGES), ("logits", -1)]
        for (stage, layer), start, stop in zip(names, places[:-1], places[1:], strict=True):
            events.append(Event(stage, "GPU", micro_batch, layer, start, stop))
    for micro_batch, calls in enumerate(host):
        for layer, (seen, answered) in enumerate(calls):
            events.append(Event(HOST_STAGE, "host", micro_batch, layer, seen, answered))
    return Timeline(tuple(sorted(events, key=lambda event: event.start_ns)))


def _clock_offset(times: list[list[int]], host: list[list[tuple[int, int]]]) -> int:
    """The difference of the two clocks: GPU time plus the offset is host time.

    The host sees a request after the GPU posts it, and the GPU sees an answer after the host writes
    it. So every layer bounds the offset from both sides; the middle of the tightest bounds is used.
    """
    most, least = [], []
    for stamps, calls in zip(times, host, strict=False):
        for layer, (seen, answered) in enumerate(calls):
            first = 2 + layer * len(STAGES)
            most.append(seen - stamps[first + STAGES.index("select")])
            least.append(answered - stamps[first + STAGES.index("wait")])
    return (min(most) + max(least)) // 2 if most else 0
