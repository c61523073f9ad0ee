"""Waiting: which hooks block the host until what has finished, and which return at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hwcore.testing.conformance.kit import conforms
from hwcore.testing.conformance.late import has_happened, host_goes_on

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit
    from hwcore.testing.conformance.late import LateWrite


class Waiting:
    # --- The host waits ---

    @conforms("synchronize")
    def test_synchronize_returns_after_all_work(self, kit: Kit) -> None:
        late = [kit.late_write(kit.stream()), kit.late_write(kit.hw.current_stream())]
        kit.hw.synchronize(kit.device)
        has_happened(kit, all(write.happened for write in late), "work on two streams")

    @conforms("synchronize")
    def test_synchronize_without_a_device_means_the_current_one(self, kit: Kit) -> None:
        for device in kit.each_device():
            late = kit.late_write(kit.hw.create_stream(device))
            kit.hw.synchronize()
            has_happened(kit, late.happened, f"the work of {device}, the current one,")

    @conforms("synchronize", needs="multi_device")
    def test_synchronize_waits_for_the_device_that_is_named(self, kit: Kit) -> None:
        for current in kit.each_device():
            for device in map(kit.hw.device, kit.indices):
                late = kit.late_write(kit.hw.create_stream(device))
                kit.hw.synchronize(device)
                has_happened(kit, late.happened, f"work of {device} with {current} current")

    @conforms("synchronize_stream")
    def test_synchronize_stream_returns_after_the_streams_work(self, kit: Kit) -> None:
        stream = kit.stream()
        late = kit.late_write(stream)
        kit.hw.synchronize_stream(stream)
        has_happened(kit, late.happened, "the stream's work")

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

    @conforms("query_event")
    def test_query_event_is_about_the_latest_record(self, kit: Kit) -> None:
        stream = kit.stream()
        event = kit.hw.create_event(kit.device)
        event.record(stream)
        event.synchronize()
        kit.hw.query_event(event)
        late = kit.late_write(stream)
        event.record(stream)
        reached = kit.hw.query_event(event)
        what = "the answer for an event that was reached, and then recorded behind more work"
        ahead = not reached or late.happened
        kit.that(ahead, what, reached, "False, for that work had not run", "Ask the device anew")

    # --- The host does not wait ---

    @conforms("create_stream", needs="async_streams")
    def test_work_in_a_stream_runs_while_the_host_goes_on(self, kit: Kit) -> None:
        fix = "Do not list `async_streams`, or let work in a stream run by itself"
        host_goes_on(kit, lambda late: None, "the capability `async_streams`", fix)

    @conforms("record_event", needs="async_streams")
    def test_the_host_does_not_wait_in_record_event(self, kit: Kit) -> None:
        event = kit.hw.create_event(kit.device)
        host_goes_on(kit, lambda late: kit.hw.record_event(event, late.stream))

    @conforms("query_event", needs="async_streams")
    def test_the_host_does_not_wait_in_query_event(self, kit: Kit) -> None:
        event = kit.hw.create_event(kit.device)

        def call(late: LateWrite) -> None:
            event.record(late.stream)
            kit.hw.query_event(event)

        host_goes_on(kit, call)

    @conforms("wait_event", needs="async_streams")
    def test_the_host_does_not_wait_in_wait_event(self, kit: Kit) -> None:
        consumer = kit.stream()
        kit.raw.stall(consumer)  # it has no reason to hurry to the wait

        def call(late: LateWrite) -> None:
            event = kit.hw.create_event(kit.device)
            event.record(late.stream)
            kit.hw.wait_event(event, consumer)

        host_goes_on(kit, call)

    @conforms("wait_event", needs="async_streams")
    def test_a_wait_stays_where_it_was_when_the_event_is_recorded_again(self, kit: Kit) -> None:
        idle, consumer = kit.stream(), kit.stream()

        def call(late: LateWrite) -> None:
            event = kit.hw.create_event(kit.device)
            kit.hw.record_event(event, idle)
            kit.hw.wait_event(event, consumer)
            kit.hw.record_event(event, late.stream)
            consumer.synchronize()

        fix = "Let a wait mean what was recorded before it, whatever is recorded later"
        host_goes_on(kit, call, "the stream that waits", fix)

    @conforms("wait_stream", needs="async_streams")
    def test_the_host_does_not_wait_in_wait_stream(self, kit: Kit) -> None:
        consumer = kit.stream()
        kit.raw.stall(consumer)
        host_goes_on(kit, lambda late: kit.hw.wait_stream(consumer, late.stream))


def _wait_for_event(kit: Kit, *, blocking: bool) -> None:
    stream = kit.stream()
    event = kit.hw.create_event(kit.device, blocking=blocking)
    late = kit.late_write(stream)
    event.record(stream)
    kit.hw.synchronize_event(event)
    has_happened(kit, late.happened, "the work before the event")
