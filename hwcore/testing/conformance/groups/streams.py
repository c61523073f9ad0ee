"""Streams and events: how they are made, which one is current, and when the host waits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.testing.conformance.kit import Kit, LateWrite

_ATTEMPTS = 3


class _RaisedInTestError(Exception):
    pass


class Streams:
    # --- Making them ---

    @conforms("create_stream")
    def test_every_stream_is_another(self, kit: Kit) -> None:
        streams = [kit.stream() for _ in range(4)]
        fix = "Make a new stream at each call"
        distinct = [s for n, s in enumerate(streams) if s not in streams[:n]]
        kit.same("distinct streams of four", len(distinct), 4, "as many as were made", fix)
        default = kit.hw.current_stream(kit.device)
        kit.that(default not in streams, "a new stream", default, "not the current one", fix)

    @conforms("create_stream")
    def test_a_stream_is_on_the_device_asked_for(self, kit: Kit) -> None:
        for index in kit.indices:
            device = kit.hw.device(index)
            got = kit.hw.create_stream(device).device
            fix = "Make it on `device`"
            kit.same("attribute `device`", got, device, "the device asked for", fix)

    @conforms("create_stream")
    def test_priorities_are_accepted(self, kit: Kit) -> None:
        for priority in (0, -1):
            kit.hw.create_stream(kit.device, priority)

    @conforms("create_stream", needs="stream_priorities")
    def test_a_stream_has_the_priority_asked_for(self, kit: Kit) -> None:
        streams = [kit.hw.create_stream(kit.device, priority) for priority in (0, -1)]
        usual, urgent = (kit.raw.priority(stream) for stream in streams)
        if usual is None or urgent is None:
            return  # torch's generic streams do not tell
        got, expected = (usual, urgent), "the second lower, since `stream_priorities` is listed"
        fix = "Hand `priority` on to the device; lower runs first"
        kit.that(urgent < usual, "priorities of streams made with 0 and -1", got, expected, fix)

    @conforms("create_event")
    def test_an_event_never_recorded_holds_nobody_up(self, kit: Kit) -> None:
        event = kit.hw.create_event(kit.device)
        fix = "Make it unrecorded, and let unrecorded events count as reached"
        reached = kit.hw.query_event(event)
        kit.that(reached, "query_event() of it", reached, "True", fix, hook="query_event")
        kit.hw.synchronize_event(event)
        kit.hw.wait_event(event, kit.stream())

    @conforms("create_event")
    def test_every_event_is_another(self, kit: Kit) -> None:
        recorded, never = (kit.hw.create_event(kit.device) for _ in range(2))
        stream = kit.stream()
        late = kit.late_write(stream)
        recorded.record(stream)
        reached = never.query()
        fix = "Make a new event at each call"
        what = "query() of an event while another waits for work"
        kit.that(reached or late.happened, what, reached, "True, for it was never recorded", fix)

    @conforms("create_event", needs="event_timing")
    def test_elapsed_time_is_in_milliseconds(self, kit: Kit) -> None:
        start, end = (kit.hw.create_event(kit.device, enable_timing=True) for _ in range(2))
        stream = kit.hw.current_stream(kit.device)
        began = time.perf_counter()
        start.record(stream)
        kit.raw.settle()
        time.sleep(0.03)
        end.record(stream)
        kit.raw.settle()
        outer_ms = (time.perf_counter() - began) * 1e3
        got = start.elapsed_time(end)
        expected = f"between 20 and {outer_ms + 10:.0f}, for the host slept 30 ms in between"
        fix = "Give events made with enable_timing=True an elapsed_time() in milliseconds"
        kit.that(20 <= got <= outer_ms + 10, "elapsed_time()", got, expected, fix)

    # --- The current stream ---

    @conforms("current_stream")
    def test_the_current_stream_is_the_one_that_was_entered(self, kit: Kit) -> None:
        before = kit.hw.current_stream()
        one, two = kit.stream(), kit.stream()
        fix = "Return the stream that the calling thread entered last"
        with kit.raw.on(one):
            kit.same("within one stream", kit.hw.current_stream(), one, "that stream", fix)
            with kit.raw.on(two):
                kit.same("within two", kit.hw.current_stream(), two, "the inner one", fix)
            kit.same("back in one", kit.hw.current_stream(), one, "the outer one", fix)
        kit.same("outside", kit.hw.current_stream(), before, "the stream from before", fix)

    @conforms("current_stream")
    def test_a_device_that_is_named_has_the_same_current_stream(self, kit: Kit) -> None:
        stream = kit.stream()
        with kit.raw.on(stream):
            got = kit.hw.current_stream(kit.device)
        fix = "Return the calling thread's current stream on `device`"
        kit.same("for the stream's device", got, stream, "the stream that was entered", fix)

    @conforms("current_stream")
    def test_each_thread_has_its_own_current_stream(self, kit: Kit) -> None:
        default = kit.in_thread(lambda: kit.hw.current_stream(kit.device))
        with kit.raw.on(kit.stream()):
            got = kit.in_thread(lambda: kit.hw.current_stream(kit.device))
        fix = "Keep the current stream per thread"
        kit.same("in a thread that entered none", got, default, "its default stream", fix)

    @conforms("stream_context")
    def test_stream_context_makes_the_stream_current_and_restores(self, kit: Kit) -> None:
        before = kit.hw.current_stream()
        one, two = kit.stream(), kit.stream()
        fix = "Set the stream on entering, and the former one on leaving"
        with kit.hw.stream_context(one):
            with kit.hw.stream_context(two):
                got = kit.hw.current_stream()
                kit.same("the current stream within it", got, two, "the stream given", fix)
            got = kit.hw.current_stream()
            kit.same("the current stream after an inner one", got, one, "the outer one", fix)
        got = kit.hw.current_stream()
        kit.same("the current stream after it", got, before, "the one from before", fix)

    @conforms("stream_context")
    def test_stream_context_restores_after_an_exception(self, kit: Kit) -> None:
        before = kit.hw.current_stream()
        with_error = kit.stream()
        try:
            with kit.hw.stream_context(with_error):
                message = "raised within the context"
                raise _RaisedInTestError(message)  # noqa: TRY301 - this is what is tested
        except _RaisedInTestError:
            pass
        else:
            expected = "the exception raised within the context"
            kit.fail("the caller", "no exception", expected, "Let exceptions pass")
        fix = "Restore in a `finally`"
        got = kit.hw.current_stream()
        kit.same("the current stream after an exception", got, before, "the one from before", fix)

    @conforms("stream_context")
    def test_work_within_stream_context_goes_into_the_stream(self, kit: Kit) -> None:
        stream = kit.stream()
        source, seen = kit.tensor([7.0]), kit.tensor([0.0])
        with kit.hw.stream_context(stream):
            seen.copy_(source)
        fix = "Make the stream current for torch too"
        got = kit.raw.read(seen, stream)
        kit.same("what work within it wrote", got, torch.tensor([7.0]), "once it is done", fix)

    @conforms("stream_context", needs="multi_device")
    def test_stream_context_makes_the_streams_device_current(self, kit: Kit) -> None:
        kit.hw.set_device(0)
        stream = kit.hw.create_stream(kit.hw.device(1))
        fix = "Switch the device with the stream, and back with it"
        with kit.hw.stream_context(stream):
            got = torch.zeros(1, device=kit.hw.info.device_type).device.index
            kit.same("a tensor's device within it", got, 1, "the stream's device", fix)
        got = torch.zeros(1, device=kit.hw.info.device_type).device.index
        kit.same("a tensor's device after it", got, 0, "the device from before", fix)

    # --- The host waits ---

    @conforms("synchronize")
    def test_synchronize_returns_after_all_work(self, kit: Kit) -> None:
        late = [kit.late_write(kit.stream()), kit.late_write(kit.hw.current_stream())]
        kit.hw.synchronize(kit.device)
        _has_happened(kit, all(write.happened for write in late), "work on two streams")

    @conforms("synchronize")
    def test_synchronize_without_a_device_means_the_current_one(self, kit: Kit) -> None:
        kit.hw.set_device(0)
        late = kit.late_write(kit.stream())
        kit.hw.synchronize()
        _has_happened(kit, late.happened, "the current device's work")

    @conforms("synchronize_stream")
    def test_synchronize_stream_returns_after_the_streams_work(self, kit: Kit) -> None:
        stream = kit.stream()
        late = kit.late_write(stream)
        kit.hw.synchronize_stream(stream)
        _has_happened(kit, late.happened, "the stream's work")

    @conforms("synchronize_event")
    def test_synchronize_event_returns_after_the_event(self, kit: Kit) -> None:
        _wait_for_event(kit, blocking=False)

    @conforms("synchronize_event")
    def test_synchronize_event_returns_for_a_blocking_event(self, kit: Kit) -> None:
        _wait_for_event(kit, blocking=True)

    @conforms("synchronize_event", needs="blocking_events")
    def test_the_host_sleeps_while_it_waits_for_a_blocking_event(self, kit: Kit) -> None:
        stream = kit.stream()
        event = kit.hw.create_event(kit.device, blocking=True)
        kit.late_write(stream)
        event.record(stream)
        began, began_cpu = time.perf_counter(), time.thread_time()
        kit.hw.synchronize_event(event)
        waited_s = time.perf_counter() - began
        busy = (time.thread_time() - began_cpu) / waited_s
        if waited_s < 0.05 or kit.raw.computes_on_the_host:
            return  # nothing to be seen
        fix = "Hand `blocking` on to the device, or do not list `blocking_events`"
        expected = "below 0.5, for the host is to sleep"
        kit.that(busy < 0.5, "the share of the wait spent computing", busy, expected, fix)

    @conforms("query_event")
    def test_query_event_says_true_only_after_the_work(self, kit: Kit) -> None:
        stream = kit.stream()
        event = kit.hw.create_event(kit.device)
        late = kit.late_write(stream)
        event.record(stream)
        reached = kit.hw.query_event(event)
        expected = "False, for the work before the event had not run"
        fix = "Ask the device"
        kit.that(not reached or late.happened, "the answer", reached, expected, fix)
        event.synchronize()
        reached = kit.hw.query_event(event)
        kit.that(reached, "the answer after the work", reached, "True", fix)

    # --- The host does not wait ---

    @conforms("create_stream", needs="async_streams")
    def test_work_in_a_stream_runs_while_the_host_goes_on(self, kit: Kit) -> None:
        fix = "Do not list `async_streams`, or let work in a stream run by itself"
        _host_goes_on(kit, lambda late: None, "the capability `async_streams`", fix)

    @conforms("record_event", needs="async_streams")
    def test_the_host_does_not_wait_in_record_event(self, kit: Kit) -> None:
        event = kit.hw.create_event(kit.device)
        _host_goes_on(kit, lambda late: kit.hw.record_event(event, late.stream), "the host")

    @conforms("query_event", needs="async_streams")
    def test_the_host_does_not_wait_in_query_event(self, kit: Kit) -> None:
        event = kit.hw.create_event(kit.device)

        def call(late: LateWrite) -> None:
            event.record(late.stream)
            kit.hw.query_event(event)

        _host_goes_on(kit, call, "the host")

    @conforms("wait_event", needs="async_streams")
    def test_the_host_does_not_wait_in_wait_event(self, kit: Kit) -> None:
        consumer = kit.stream()
        kit.raw.stall(consumer)  # it has no reason to hurry to the wait

        def call(late: LateWrite) -> None:
            event = kit.hw.create_event(kit.device)
            event.record(late.stream)
            kit.hw.wait_event(event, consumer)

        _host_goes_on(kit, call, "the host")

    @conforms("wait_stream", needs="async_streams")
    def test_the_host_does_not_wait_in_wait_stream(self, kit: Kit) -> None:
        consumer = kit.stream()
        kit.raw.stall(consumer)
        _host_goes_on(kit, lambda late: kit.hw.wait_stream(consumer, late.stream), "the host")


def _wait_for_event(kit: Kit, *, blocking: bool) -> None:
    stream = kit.stream()
    event = kit.hw.create_event(kit.device, blocking=blocking)
    late = kit.late_write(stream)
    event.record(stream)
    kit.hw.synchronize_event(event)
    _has_happened(kit, late.happened, "the work before the event")


def _has_happened(kit: Kit, happened: bool, what: str) -> None:
    expected = "every write of it in memory by the time that the call returned"
    kit.that(happened, what, "still running", expected, "Block the host until it has finished")


def _host_goes_on(
    kit: Kit, call: Callable[[LateWrite], None], what: str, fix: str = "Return at once"
) -> None:
    """Fail if slow work is always over when a call returns.

    Once is enough: between the call and the look the machine may have paused.
    """
    for _ in range(_ATTEMPTS):
        late = kit.late_write(kit.stream())
        call(late)
        if not late.happened:
            return
    got = "work that was over each time the host looked"
    kit.fail(what, got, "work that runs later than the call which enqueues it", fix)
