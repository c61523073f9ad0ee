"""Streams and events: how they are made, and which stream is current."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from hwcore.errors import CapabilityError
from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit


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
    def test_a_stream_is_on_the_current_device_where_none_is_given(self, kit: Kit) -> None:
        for device in kit.each_device():
            got = kit.hw.create_stream().device
            fix = "Take None as the current device"
            kit.same("attribute `device`", got, device, "the current device", fix)

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

    @conforms("create_event")
    def test_an_event_can_be_recorded_on_the_device_it_was_made_for(self, kit: Kit) -> None:
        fix = "Make it on `device`; take None as the current one"
        for current in kit.each_device():
            for device in (None, *map(kit.hw.device, kit.indices)):
                event = kit.hw.create_event(device)
                expected = device or current
                made_for = getattr(event, "device", expected)
                if made_for.index is not None:  # torch may leave it open until it is recorded
                    why = f"for device {device}"
                    kit.same("attribute `device`", made_for, expected, why, fix)
                event.record(kit.hw.create_stream(expected))
                event.synchronize()

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

    @conforms("create_event")
    def test_an_event_for_other_processes_has_a_handle_or_is_refused(self, kit: Kit) -> None:
        fix = "Hand `interprocess` on to the device, or raise CapabilityError"
        listed = "interprocess_events" in kit.hw.info.capabilities
        try:
            event = kit.hw.create_event(kit.device, interprocess=True)
        except CapabilityError as error:
            why = "an event, since `interprocess_events` is listed"
            kit.that(not listed, "create_event(interprocess=True)", error, why, fix)
            return
        why = "CapabilityError, since `interprocess_events` is not listed"
        kit.that(listed, "create_event(interprocess=True)", event, why, fix)
        event.record(kit.stream())
        handle: Any = getattr(event, "ipc_handle", bytes)()
        kit.that(bool(handle), "its ipc_handle()", handle, "a handle that is not empty", fix)

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
    def test_every_device_has_a_current_stream_of_its_own(self, kit: Kit) -> None:
        fix = "Look at `device`; take None as the current one"
        for current in kit.each_device():
            for device in (None, *map(kit.hw.device, kit.indices)):
                got = kit.hw.current_stream(device).device
                why = f"with {current} current"
                kit.same(f"the device for {device}", got, device or current, why, fix)

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
    def test_stream_context_leaves_other_threads_alone(self, kit: Kit) -> None:
        default = kit.in_thread(lambda: kit.hw.current_stream(kit.device))
        with kit.hw.stream_context(kit.stream()):
            got = kit.in_thread(lambda: kit.hw.current_stream(kit.device))
        fix = "Set the stream for the calling thread alone"
        kit.same("another thread's current stream", got, default, "its default stream", fix)

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
