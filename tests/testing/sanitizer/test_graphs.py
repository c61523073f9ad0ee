"""Graphs: a replay touches again what was captured."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

from hwcore.testing.sanitizer import RaceWarning, Sanitizer
from hwcore.testing.sanitizer.history import Record
from hwcore.testing.sanitizer.hooks import Hooks


@pytest.fixture
def graph(hw, sanitizer, zeros):
    """A graph that reads `x` and writes `out`; captured, the host having waited."""
    x, out = zeros(8), zeros(8)
    graph = hw.create_graph()

    def step():
        out.copy_(x * 2)
        return out

    hw.graph_capture(graph, step)
    hw.synchronize()
    assert sanitizer.take() == []
    yield graph, x, out
    hw.synchronize()


def test_a_replay_reads_what_was_captured(hw, sanitizer, streams, graph):
    _, side = streams
    graph, x, _ = graph
    x.add_(1)
    with hw.stream_context(side):
        hw.graph_replay(graph)
    race = sanitizer.take()[0]
    assert race.kind == "read after write"
    assert (race.current.op, race.current.stream) == ("aten::mul", "`side`")
    assert "test_a_replay_reads_what_was_captured" in race.current.stack[0]
    assert "in step" in race.current.captured[0]
    assert "captured at" in str(race)


def test_a_replay_writes_what_was_captured(hw, sanitizer, streams, graph):
    _, side = streams
    graph, _, out = graph
    with hw.stream_context(side):
        hw.graph_replay(graph)
    y = out + 1
    race = sanitizer.take()[0]
    assert race.kind == "read after write"
    assert (race.previous.op, race.previous.stream) == ("aten::copy_", "`side`")
    assert "in step" in race.previous.captured[0]
    hw.synchronize()
    del y


def test_an_ordered_replay_is_no_race(hw, sanitizer, streams, graph):
    main, side = streams
    graph, x, out = graph
    for _ in range(3):
        x.add_(1)
        hw.wait_stream(side, main)
        with hw.stream_context(side):
            hw.graph_replay(graph)
        hw.wait_stream(main, side)
        out.add_(1)
    assert sanitizer.take() == []


def test_replays_of_two_graphs_race_with_each_other(hw, sanitizer, streams, graph):
    _, side = streams
    graph, x, _ = graph
    other = hw.create_graph()
    hw.graph_capture(other, lambda: x.add_(1))
    hw.synchronize()
    hw.graph_replay(other)
    with hw.stream_context(side):
        hw.graph_replay(graph)
    race = sanitizer.take()[0]
    assert race.current.captured
    assert race.previous.captured


def test_a_capture_counts_as_a_run_only_where_it_runs(hw, sanitizer, streams, zeros):
    _, side = streams
    x = zeros(8)
    with hw.stream_context(side):
        x.add_(1)
    graph = hw.create_graph()
    kept = hw.graph_capture(graph, lambda: x * 2)
    executes = "capture_executes" in hw.info.quirks
    assert bool(sanitizer.take()) is executes
    hw.synchronize()
    del kept


def test_a_failed_capture_leaves_nothing_behind(hw, sanitizer, zeros):
    x = zeros(8)

    def broken():
        x.add_(1)
        raise KeyError

    graph = hw.create_graph()
    with pytest.raises(KeyError):
        hw.graph_capture(graph, broken)
    assert sanitizer._tracker.thread.capture is None
    x.add_(1)
    assert sanitizer.take() == []
    hw.synchronize()


def test_what_was_captured_goes_with_the_graph(hw, sanitizer, zeros):
    def records():
        gc.collect()
        return sum(type(thing) is Record for thing in gc.get_objects())

    x = zeros(8)
    graph = hw.create_graph()
    before = records()
    hw.graph_capture(graph, lambda: [x.add_(1) for _ in range(3)])
    hw.graph_replay(graph)
    if hasattr(graph, "close"):
        graph.close()
    del graph
    x.add_(1)
    assert records() <= before + 1
    hw.synchronize()


def test_a_tensor_of_a_graph_may_be_dropped(hw, sanitizer, streams, graph):
    _, side = streams
    graph, _, _ = graph
    with hw.stream_context(side):
        hw.graph_replay(graph)
    assert sanitizer.take() == []
    torch.ones(1, device=hw.device())
    assert sanitizer.take() == []


def test_a_graph_of_before_the_sanitizer_is_told_of_once(hw, zeros):
    x = zeros(8)
    graph = hw.create_graph()
    hw.graph_capture(graph, lambda: x.add_(1))
    hw.synchronize()
    with Sanitizer(hw):
        with pytest.warns(RaceWarning, match="captured before the sanitizer was on") as caught:
            hw.graph_replay(graph)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hw.graph_replay(graph)
    assert caught[0].filename == __file__
    hw.synchronize()


def test_a_graph_that_takes_no_weak_reference_is_followed(sanitizer):
    class Slotted:
        __slots__ = ()

    hooks, graph = Hooks(sanitizer._tracker), Slotted()
    capture = hooks.graph_capture(graph)
    next(capture)
    with pytest.raises(StopIteration):
        capture.send(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a graph that was not captured would warn
        replay = hooks.graph_replay(graph)
        next(replay)
        with pytest.raises(StopIteration):
            replay.send(None)
