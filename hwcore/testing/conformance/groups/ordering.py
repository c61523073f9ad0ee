"""Ordering: what runs after what. Each test orders two streams by one hook, and looks at values.

Where a stream has to wait for a second one, the second is slow, so that a missing wait gives the
wrong value on a real device, and on a simulated one that runs nothing before it must.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit
    from hwcore.types import Stream

_WAIT = "Make later work of the waiting stream wait"


class Handover:
    """A value that one stream writes, late, and another reads into a place of its own.

    ``reader`` is the device of the reading stream; default: that of the writing one.
    """

    def __init__(self, kit: Kit, reader: torch.device | None = None) -> None:
        self.kit = kit
        self.producer: Stream = kit.stream()
        self.consumer: Stream = kit.hw.create_stream(reader or kit.device)
        self._value, self._fresh = kit.tensor([0.0]), kit.tensor([7.0])
        self._seen = kit.tensor([-1.0], device=reader)

    def write(self) -> None:
        with self.kit.raw.on(self.producer):
            self.kit.raw.stall(self.producer)
            self._value.copy_(self._fresh)

    def read(self, stream: Stream | None = None) -> None:
        with self.kit.raw.on(stream or self.consumer):
            self._seen.copy_(self._value, non_blocking=True)

    def overwrite(self) -> None:
        """Write again in the reading stream: too early if the reader was not waited for."""
        with self.kit.raw.on(self.consumer):
            self._value.fill_(9.0)

    def check(self, fix: str = _WAIT, stream: Stream | None = None) -> None:
        got = self.kit.raw.read(self._seen, stream or self.consumer)
        why = "what the other stream had written before it"
        self.kit.same("what the waiting stream read", got, torch.tensor([7.0]), why, fix)


class Ordering:
    @conforms("wait_event")
    def test_a_stream_waits_for_an_event(self, kit: Kit) -> None:
        over = Handover(kit)
        event = kit.hw.create_event(kit.device)
        over.write()
        event.record(over.producer)
        kit.hw.wait_event(event, over.consumer)
        over.read()
        over.check()

    @conforms("wait_event")
    def test_the_current_stream_waits_where_none_is_given(self, kit: Kit) -> None:
        over = Handover(kit)
        event = kit.hw.create_event(kit.device)
        over.write()
        event.record(over.producer)
        with kit.raw.on(over.consumer):
            kit.hw.wait_event(event)
        over.read()
        over.check("Take None as the current stream")

    @conforms("wait_event")
    def test_waiting_covers_the_latest_record_before_the_wait(self, kit: Kit) -> None:
        over = Handover(kit)
        event = kit.hw.create_event(kit.device)
        event.record(over.producer)
        over.write()
        event.record(over.producer)
        kit.hw.wait_event(event, over.consumer)
        over.read()
        over.check("Let recording an event again move it")

    @conforms("record_event")
    def test_an_event_is_recorded_in_the_stream_given(self, kit: Kit) -> None:
        over = Handover(kit)
        event = kit.hw.create_event(kit.device)
        over.write()
        kit.hw.record_event(event, over.producer)
        event.wait(over.consumer)
        over.read()
        over.check("Record it behind the work now in `stream`")

    @conforms("record_event")
    def test_an_event_is_recorded_in_the_current_stream_where_none_is_given(self, kit: Kit) -> None:
        over = Handover(kit)
        event = kit.hw.create_event(kit.device)
        over.write()
        with kit.raw.on(over.producer):
            kit.hw.record_event(event)
        event.wait(over.consumer)
        over.read()
        over.check("Take None as the current stream")

    @conforms("record_event")
    def test_recording_an_event_again_moves_it(self, kit: Kit) -> None:
        over = Handover(kit)
        event = kit.hw.create_event(kit.device)
        kit.hw.record_event(event, over.producer)
        over.write()
        kit.hw.record_event(event, over.producer)
        event.wait(over.consumer)
        over.read()
        over.check("Record it anew at each call")

    @conforms("wait_stream")
    def test_a_stream_waits_for_a_stream(self, kit: Kit) -> None:
        over = Handover(kit)
        over.write()
        kit.hw.wait_stream(over.consumer, over.producer)
        over.read()
        over.check("Make `waiter` wait for `producer`, not the other way round")

    @conforms("wait_stream")
    def test_waits_pass_through_a_third_stream(self, kit: Kit) -> None:
        over, between = Handover(kit), kit.stream()
        over.write()
        kit.hw.wait_stream(between, over.producer)
        kit.hw.wait_stream(over.consumer, between)
        over.read()
        over.check()

    @conforms("wait_stream")
    def test_a_write_waits_for_an_earlier_read_in_another_stream(self, kit: Kit) -> None:
        reader, writer = kit.stream(), kit.stream()
        value, seen = kit.tensor([7.0]), kit.tensor([0.0])
        with kit.raw.on(reader):
            kit.raw.stall(reader)
            seen.copy_(value)
        kit.hw.wait_stream(writer, reader)
        with kit.raw.on(writer):
            value.fill_(9.0)
        writer.synchronize()
        got = kit.raw.read(seen, reader)
        why = "the value before the stream that waits overwrote it"
        kit.same("what the earlier stream read", got, torch.tensor([7.0]), why, _WAIT)

    @conforms("wait_stream")
    def test_a_stream_that_waits_for_itself_goes_on(self, kit: Kit) -> None:
        over = Handover(kit)
        over.write()
        kit.hw.wait_stream(over.producer, over.producer)
        over.read(over.producer)
        over.check("Return at once for one and the same stream", over.producer)

    @conforms("wait_stream", needs="multi_device")
    def test_streams_of_two_devices_wait_for_each_other(self, kit: Kit) -> None:
        over = Handover(kit, kit.hw.device(1))
        over.write()
        kit.hw.wait_stream(over.consumer, over.producer)
        over.read()
        over.check()

    @conforms("wait_event", needs="multi_device")
    def test_a_stream_waits_for_an_event_of_another_device(self, kit: Kit) -> None:
        over = Handover(kit, kit.hw.device(1))
        event = kit.hw.create_event(kit.device)
        over.write()
        event.record(over.producer)
        kit.hw.wait_event(event, over.consumer)
        over.read()
        over.check()

    @conforms("current_stream")
    def test_work_of_one_stream_runs_in_the_order_it_was_enqueued(self, kit: Kit) -> None:
        stream = kit.stream()
        value = kit.tensor([1.0])
        with kit.raw.on(stream):
            kit.raw.stall(stream)
            for _ in range(8):
                value.mul_(2).add_(1)
        got = kit.raw.read(value, stream)
        fix = "Run a stream's work first in, first out"
        kit.same("eight steps in one stream", got, torch.tensor([511.0]), "their result", fix)

    @conforms("wait_event")
    def test_the_sanitizer_sees_the_order_that_the_hooks_make(self, kit: Kit) -> None:
        try:
            from hwcore.testing.sanitizer import Sanitizer
        except ImportError:
            kit.skip("sanitizer", "this hwcore has no race sanitizer")

        for ordered in (True, False):
            producer, consumer = kit.stream(), kit.stream()
            value, seen = kit.tensor([0.0]), kit.tensor([0.0])
            event = kit.hw.create_event(kit.device)
            with Sanitizer(kit.hw, on_race="collect") as sanitizer:
                with kit.hw.stream_context(producer):
                    value.fill_(7.0)
                kit.hw.record_event(event, producer)
                if ordered:
                    kit.hw.wait_event(event, consumer)
                with kit.hw.stream_context(consumer):
                    seen.copy_(value)
                kit.hw.synchronize()
            races = [str(race) for race in sanitizer.races]
            fix = "Let streams be equal to themselves alone, and stream_context set the current one"
            what = "the races reported " + ("with" if ordered else "without") + " a wait"
            expected = "none" if ordered else "at least one"
            kit.that(bool(races) != ordered, what, races, expected, fix)
