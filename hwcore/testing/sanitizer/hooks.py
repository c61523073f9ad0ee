"""The backend's hooks as the sanitizer hears them: wrappers that report each edge."""

# Hooks are documented in hookspecs.py, once:
# ruff: noqa: D102

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import hwcore
from hwcore.testing.sanitizer import stacks
from hwcore.testing.sanitizer.clocks import Attached
from hwcore.testing.sanitizer.history import Record
from hwcore.testing.sanitizer.reports import RaceWarning

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    import torch

    from hwcore.testing.sanitizer.clocks import Lane, Snapshot
    from hwcore.testing.sanitizer.tracker import Captured, Tracker

    Wrapper = Generator[None, Any, Any]

__all__ = ["Hooks"]


class Hooks:
    """Hook wrappers for :meth:`hwcore.Backend.register`.

    An edge is entered after its hook has returned: one that raised made none. What the host waits
    for is what had been submitted when it began to wait.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._graphs: Attached[Captured | None] = Attached()

    # --- Made ---

    @hwcore.hookimpl(wrapper=True)
    def create_stream(self) -> Wrapper:
        stream = yield
        name = stacks.assigned_name(stacks.capture())
        with self._tracker.changing():
            self._tracker.clocks.created(stream, name)
            self._tracker.forget_gone_streams()
        return stream

    @hwcore.hookimpl(wrapper=True)
    def create_event(self) -> Wrapper:
        event = yield
        with self._tracker.changing():
            self._tracker.clocks.event_made(event)
        return event

    @hwcore.hookimpl(wrapper=True)
    def pin_memory(self) -> Wrapper:
        tensor = yield
        with self._tracker.changing():
            self._tracker.pinned(tensor)
        return tensor

    # --- Streams wait ---

    @hwcore.hookimpl(wrapper=True)
    def stream_context(self) -> Wrapper:
        self._lane(None)  # the stream of before is `current`, not the one that is entered
        return (yield)

    @hwcore.hookimpl(wrapper=True)
    def record_event(self, event: Any, stream: Any) -> Wrapper:
        result = yield
        lane = self._lane(stream)
        with self._edges() as clocks:
            if clocks:
                clocks.record(event, lane)
        return result

    @hwcore.hookimpl(wrapper=True)
    def wait_event(self, event: Any, stream: Any) -> Wrapper:
        result = yield
        lane = self._lane(stream)
        with self._edges() as clocks:
            unrecorded = clocks is not None and clocks.is_unrecorded(event)
            if clocks:
                clocks.acquire(lane, clocks.snapshot(event))
        if unrecorded:
            message = (
                f"backend.wait_event: `event` got an event that was never recorded, so that "
                f"`{lane.name}` waits for nothing; expected one recorded before the wait. Call "
                f"backend.record_event first (waited for at {_here()})."
            )
            stacks.warn(RaceWarning(message))
        return result

    @hwcore.hookimpl(wrapper=True)
    def wait_stream(self, waiter: Any, producer: Any) -> Wrapper:
        result = yield
        ours, theirs = self._lane(waiter), self._lane(producer)
        with self._edges() as clocks:
            if clocks:
                clocks.acquire(ours, clocks.release(theirs))
        return result

    # --- The host waits ---

    @hwcore.hookimpl(wrapper=True)
    def synchronize(self, device: torch.device | None) -> Wrapper:
        if device is None or device.index is None:
            device = self._lane(None).device
        with self._tracker.lock:
            clocks = self._tracker.clocks
            snapshot: Snapshot = {}
            for lane in clocks.lanes.values():
                if lane.device == device:
                    for other, epoch in clocks.release(lane).items():
                        snapshot[other] = max(epoch, snapshot.get(other, 0))
        result = yield
        self._observe(snapshot)
        return result

    @hwcore.hookimpl(wrapper=True)
    def synchronize_stream(self, stream: Any) -> Wrapper:
        lane = self._lane(stream)
        with self._tracker.lock:
            snapshot = self._tracker.clocks.release(lane)
        result = yield
        self._observe(snapshot)
        return result

    @hwcore.hookimpl(wrapper=True)
    def synchronize_event(self, event: Any) -> Wrapper:
        snapshot = self._tracker.clocks.snapshot(event)
        result = yield
        self._observe(snapshot)
        return result

    @hwcore.hookimpl(wrapper=True)
    def query_event(self, event: Any) -> Wrapper:
        snapshot = self._tracker.clocks.snapshot(event)
        reached = yield
        if reached:
            self._observe(snapshot)
        return reached

    # --- Memory and graphs ---

    @hwcore.hookimpl(wrapper=True)
    def record_stream(self, tensor: torch.Tensor, stream: Any) -> Wrapper:
        result = yield
        with self._tracker.changing():
            history = self._tracker.find_or_begin(tensor)
            if history is not None:
                history.recorded.add(self._lane(stream))
        return result

    @hwcore.hookimpl(wrapper=True)
    def graph_capture(self, graph: Any) -> Wrapper:
        thread = self._tracker.thread
        captured: Captured = {}
        thread.capture = captured
        try:
            outputs = yield
        finally:
            thread.capture = None
        self._graphs[graph] = captured
        return outputs

    @hwcore.hookimpl(wrapper=True)
    def graph_replay(self, graph: Any) -> Wrapper:
        captured = self._graphs.get(graph, None)
        if not captured:
            result = yield
            if captured is None:
                self._graphs[graph] = {}
                message = (
                    f"backend.graph_replay: `graph` got one that was captured before the sanitizer "
                    f"was on; what it reads and writes is unknown, and races with it are not "
                    f"reported. Capture it while the sanitizer is on (replayed at {_here()})."
                )
                stacks.warn(RaceWarning(message))
            return result
        lane, stack = self._lane(None), stacks.capture()
        with self._tracker.changing() as found:
            for (history, region, write), first in captured.items():
                if history.alive:
                    record = Record(lane, region, write, first.op, stack, first.stack)
                    self._tracker.enter(found, history, record)
        self._tracker.thread.replay = captured
        try:
            return (yield)
        finally:
            self._tracker.thread.replay = None

    # --- Shared ---

    def _lane(self, stream: Any) -> Lane:
        if stream is None:
            return self._tracker.lane()
        with self._tracker.lock:
            return self._tracker.clocks.lane(stream)

    @contextlib.contextmanager
    def _edges(self) -> Iterator[Any]:
        """Give the clocks, or None while a capture that runs nothing makes edges for its replay."""
        idle = self._tracker.thread.capture is not None and not self._tracker.capture_executes
        with self._tracker.changing():
            yield None if idle else self._tracker.clocks

    def _observe(self, snapshot: Snapshot) -> None:
        with self._tracker.changing():
            self._tracker.clocks.observe(snapshot)


def _here() -> str:
    where = stacks.lines(stacks.capture())
    return where[0] if where else "an unknown line"
