"""A capture by the device itself: what its caller is owed, at whatever point it fails."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

from hwcore.errors import ArgumentTypeError, CaptureError, ConsumeOnceError
from hwcore.graphs import native
from hwcore.graphs.native import Graph


class Device:
    """A device that notes what a capture asks of it, and fails where it is told to.

    Attributes
    ----------
    fails : dict of str to Exception
        By the method that raises it.
    """

    def __init__(self, **fails):
        self.fails, self.calls, self.streams = fails, [], ["current"]
        self.made = 0

    def _do(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.fails:
            raise self.fails[name]

    def create(self):
        self.made += 1
        return NativeGraph(self, self.made)

    def pool(self):
        return "its own pool"

    def stream(self):
        return "kept stream"

    @contextlib.contextmanager
    def context(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def prepare(self):
        self._do("prepare")

    def begin(self, graph, pool):
        self._do("begin", graph.number, pool, self.streams[-1])

    def end(self, graph):
        self._do("end", graph.number)

    def discard(self, graph, pool):
        self._do("discard", graph.number, pool)


class NativeGraph:
    def __init__(self, device, number):
        self.device, self.number = device, number

    def replay(self):
        self.device._do("replay", self.number)


def test_a_capture_runs_between_begin_and_end_and_replays():
    device = Device()
    graph = Graph(device)
    assert graph.capture(lambda: device.calls.append("fn") or "out", "pool", "side") == "out"
    assert device.calls == [("prepare",), ("begin", 1, "pool", "side"), "fn", ("end", 1)]
    assert graph.replay() == "out"
    assert device.calls[-1] == ("replay", 1)
    assert graph.native.number == 1


def test_without_stream_and_pool_the_device_has_them():
    device = Device()
    Graph(device).capture(lambda: None)
    assert ("begin", 1, "its own pool", "kept stream") in device.calls


REFUSED = RuntimeError("operation not permitted")


@pytest.mark.parametrize(
    ("fails", "raised", "error"),
    [
        # What the function raises passes, whether or not the device still ends the capture.
        ({}, ZeroDivisionError(), ZeroDivisionError),
        ({"end": RuntimeError("broken")}, ZeroDivisionError(), ZeroDivisionError),
        ({}, KeyboardInterrupt(), KeyboardInterrupt),
        ({}, RuntimeError("its own"), RuntimeError),
        ({"end": RuntimeError("broken")}, torch.OutOfMemoryError(), torch.OutOfMemoryError),
        ({"end": RuntimeError("broken")}, ConsumeOnceError("b", 1, 2, "c", "d"), ConsumeOnceError),
        # A device's words get a name.
        ({"end": RuntimeError("broken")}, REFUSED, CaptureError),
        ({"end": RuntimeError("unjoined work")}, None, CaptureError),
        ({"begin": RuntimeError("on the default stream")}, None, CaptureError),
        # What fails while cleaning up hides none of it.
        ({"discard": RuntimeError("again")}, ZeroDivisionError(), ZeroDivisionError),
        ({"prepare": RuntimeError("no context")}, None, RuntimeError),
    ],
)
def test_after_any_failure_stream_pool_and_graph_are_as_before(fails, raised, error):
    def fn():
        if raised is not None:
            raise raised
        return "out"

    device = Device(**fails)
    graph = Graph(device)
    with pytest.raises(error) as caught:
        graph.capture(fn, "pool", "side")
    assert caught.type is error
    assert device.streams == ["current"]
    assert not native.in_capture()
    began = any(call[0] == "begin" for call in device.calls)
    assert [call for call in device.calls if call[0] == "discard"] == (
        [("discard", 1, "pool")] if began else []
    )
    assert (("end", 1) in device.calls) == began
    assert graph.native is None
    device.fails.clear()
    assert graph.capture(lambda: "again") == "again"
    assert graph.native.number == 2


def test_a_function_that_breaks_the_capture_is_told_what_a_graph_holds():
    def fn():
        raise REFUSED

    with pytest.raises(CaptureError) as caught:
        Graph(Device(end=RuntimeError("broken"))).capture(fn)
    assert caught.value.__cause__ is REFUSED
    assert str(caught.value) == (
        "Graph.capture: fn broke the capture: operation not permitted; expected device work alone, "
        "of shapes and addresses that are known beforehand. Move out of it what waits for the "
        "device, and join every stream that it forks to."
    )


def test_what_could_not_be_discarded_is_logged(caplog):
    device = Device(end=RuntimeError("broken"), discard=RuntimeError("again"))
    with caplog.at_level(logging.ERROR, "hwcore"), pytest.raises(CaptureError):
        Graph(device).capture(lambda: None)
    assert "could not be discarded" in caplog.text


def test_a_thread_captures_one_graph_at_a_time():
    device, inner = Device(), []

    def fn():
        inner.append(native.in_capture())
        Graph(device).capture(lambda: None)

    with pytest.raises(CaptureError, match="was called inside a capture"):
        Graph(device).capture(fn)
    assert inner == [True]


def test_a_graph_captures_once_replays_what_it_has_and_closes():
    device = Device()
    graph = Graph(device)
    with pytest.raises(CaptureError, match="the graph is empty"):
        graph.replay()
    graph.capture(lambda: None, "pool")
    with pytest.raises(CaptureError, match="the graph is captured already"):
        graph.capture(lambda: None)
    graph.close()
    graph.close()
    assert device.calls.count(("discard", 1, "pool")) == 1
    with pytest.raises(CaptureError, match="the graph is closed"):
        graph.replay()
    with pytest.raises(CaptureError, match="the graph is closed"):
        graph.capture(lambda: None)


def test_only_functions_can_be_captured():
    with pytest.raises(ArgumentTypeError, match="fn got 5"):
        Graph(Device()).capture(5)
