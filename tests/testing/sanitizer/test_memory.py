"""A long program: what the sanitizer remembers does not grow with its steps."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc

import pytest
import torch

from hwcore.testing.sanitizer import Sanitizer
from hwcore.testing.sanitizer.clocks import MANY_LANES
from hwcore.testing.sanitizer.history import MANY_RECORDS

STEPS = 10_000


def lazily(hw):
    if hw.info.name != "sim":
        return contextlib.nullcontext()
    from hwcore_sim import device

    return device.drain_policy("lazy")


def two_streams(hw):
    """Yield after each step of a small overlap: prepare on one stream, run on another."""
    device = hw.device()
    main, plan = hw.current_stream(), hw.create_stream()
    prepared, run = hw.create_event(), hw.create_event()
    weights = torch.ones(16, 16, device=device)
    buffers = torch.zeros(4, 16, device=device)
    block = hw.pin_memory(torch.zeros(16))
    hw.synchronize()
    step = 0
    while True:
        row = buffers[step % 4]
        hw.wait_event(run, plan) if step else None
        with hw.stream_context(plan):
            if step % 8 == 0:
                hw.synchronize_event(run)
                block.fill_(step)
            row.copy_(block, non_blocking=True)
            buffers[:, step % 16].add_(1)
            hw.record_event(prepared, plan)
        hw.wait_event(prepared, main)
        hidden = row @ weights
        hw.record_stream(hidden, plan)
        hw.record_event(run, main)
        if step % 8 == 7:
            hidden.sum().item()
        step += 1
        yield


def sizes(sanitizer):
    gc.collect()
    tracker = sanitizer._tracker
    return {
        "histories": len(tracker.histories),
        "records": sum(len(history.records) for history in tracker.histories),
        "lanes": len(tracker.clocks.lanes),
        "clocks": sum(len(lane.clock) for lane in tracker.clocks.lanes.values()),
        "events": len(tracker.clocks._events),
        "seen": len(tracker._seen),
    }


def traced_growth(steps, count):
    """Return by how many bytes the memory that Python has handed out grows in some steps."""
    for _ in range(128):
        next(steps)
    start, _ = tracemalloc.get_traced_memory()
    for _ in range(count):
        next(steps)
    gc.collect()
    end, _ = tracemalloc.get_traced_memory()
    return end - start


def test_ten_thousand_steps_of_two_streams_are_flat(hw):
    with lazily(hw), Sanitizer(hw) as sanitizer:
        steps = two_streams(hw)
        for _ in range(512):  # the program repeats itself every 16 steps
            next(steps)
        before = sizes(sanitizer)
        tracemalloc.start()
        growths = [traced_growth(steps, STEPS // 2) for _ in range(2)]
        tracemalloc.stop()
        after = sizes(sanitizer)
        hw.synchronize()
        steps.close()
    assert after == before
    # Whatever is kept of a step shows in both halves. The interpreter's table of interned strings
    # may double in one of them, 7.7 MB at once in a process that has loaded this much.
    assert min(growths) < 32 * 1024, growths


def test_replays_are_flat(hw):
    x = torch.zeros(8, device=hw.device())
    with lazily(hw), Sanitizer(hw) as sanitizer:
        graph = hw.create_graph()
        kept = hw.graph_capture(graph, lambda: x.add_(1) * 2)
        hw.synchronize()
        for step in range(300):
            hw.graph_replay(graph)
            if step == 20:
                before = sizes(sanitizer)
        assert sizes(sanitizer) == before
        hw.synchronize()
    del kept


def test_streams_that_are_gone_are_forgotten(hw):
    with Sanitizer(hw) as sanitizer:
        x = torch.zeros(8, device=hw.device())
        main = hw.current_stream()
        for _ in range(5 * MANY_LANES):
            side = hw.create_stream()
            hw.wait_stream(side, main)
            with hw.stream_context(side):
                x.add_(1)
            hw.wait_stream(main, side)
            x.add_(1)
            del side
        found = sizes(sanitizer)
        hw.synchronize()
    assert found["lanes"] <= 2 * MANY_LANES
    assert found["clocks"] <= 3 * MANY_LANES


def test_events_that_are_gone_are_forgotten(hw):
    with Sanitizer(hw) as sanitizer:
        for _ in range(100):
            hw.record_event(hw.create_event())
        assert sizes(sanitizer)["events"] <= 1


def test_tensors_that_are_gone_are_forgotten(hw):
    with Sanitizer(hw) as sanitizer:
        for _ in range(100):
            x = torch.ones(8, device=hw.device()) + 1
        del x
        torch.ones(1, device=hw.device())
        assert sizes(sanitizer)["histories"] <= 2
        hw.synchronize()


def test_a_pattern_that_never_repeats_is_bounded_and_told_of_once(hw, caplog):
    with Sanitizer(hw) as sanitizer:
        x = torch.zeros(2 * MANY_RECORDS * 8, device=hw.device())
        for start in range(2 * MANY_RECORDS):
            x[start * 8 : start * 8 + 4 : 2].fill_(1)
        assert sizes(sanitizer)["records"] <= MANY_RECORDS + 1
        hw.synchronize()
    (told,) = caplog.messages
    assert f"more than {MANY_RECORDS} accesses to one tensor" in told
    assert "made by aten::zeros" in told


@pytest.mark.parametrize("finish", ["host wait", "covering write"])
def test_what_cannot_matter_any_more_is_dropped(hw, finish):
    with Sanitizer(hw) as sanitizer:
        x = torch.zeros(8, 8, device=hw.device())
        for row in range(8):
            x[row, ::2].fill_(1)
        assert sizes(sanitizer)["records"] >= 8
        if finish == "host wait":
            hw.synchronize()
        x.fill_(1)
        assert sizes(sanitizer)["records"] == 1
        hw.synchronize()
