from __future__ import annotations

import pytest

from nearfar.runtime.steps.timeline import STAGES, timeline_of

US = 1000
AHEAD = 5_000_000  # nanoseconds that the host's clock is ahead of the GPU's


def stamps(layers: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The way there takes 2 us, the way back 3 us, the host 40 us a layer, fetching 7 us."""
    gpu, host = [0, 10 * US], []
    for _ in range(layers):
        project = gpu[-1] + 20 * US
        select = project + 30 * US
        near = select + 5 * US
        fetched = near + 7 * US
        seen, answered = select + 2 * US, select + 42 * US
        waited = answered + 3 * US
        gpu += [project, select, near, fetched, waited, waited + 4 * US, waited + 100 * US]
        host.append((seen + AHEAD, answered + AHEAD))
    gpu.append(gpu[-1] + 50 * US)
    return gpu, host


def test_stages_and_handoff() -> None:
    gpu, host = stamps(3)
    timeline = timeline_of([gpu], [host], 3)
    stages = timeline.seconds_by_stage()
    assert stages["select"] == pytest.approx(90e-6)
    assert stages["attend_far"] == pytest.approx(120e-6)
    assert stages["wait"] == pytest.approx(3 * 33e-6)
    assert timeline.handoff_seconds() == pytest.approx(5e-6)


def test_both_clocks_become_one() -> None:
    gpu, host = stamps(2)
    timeline = timeline_of([gpu], [host], 2)
    start = timeline.events[0].start_ns
    assert abs(start - AHEAD) <= 1 * US  # the ways differ by a microsecond
    for layer in range(2):
        by_stage = {e.stage: e for e in timeline.events if e.layer == layer}
        assert by_stage["select"].stop_ns <= by_stage["attend_far"].start_ns
        assert by_stage["attend_far"].stop_ns <= by_stage["wait"].stop_ns
        assert by_stage["attend_near"].start_ns < by_stage["attend_far"].start_ns


def test_nothing_far_needs_no_host() -> None:
    gpu, _ = stamps(1)
    timeline = timeline_of([gpu], [], 1)
    assert timeline.handoff_seconds() is None
    assert [e.stage for e in timeline.events] == ["embed", *STAGES, "logits"]
    assert timeline.events[0].start_ns == 0
