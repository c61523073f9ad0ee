"""What orders two accesses, and what does not."""

from __future__ import annotations

import warnings

import pytest
import torch

from hwcore.testing.sanitizer import RaceWarning


def kinds(sanitizer):
    return [race.kind for race in sanitizer.take()]


@pytest.fixture
def handed_over(hw, sanitizer, streams, zeros):
    """Write on main, run `edge`, read on side; return the kinds of races found."""
    _, side = streams

    def run(edge):
        x = zeros(8)
        x.add_(1)
        edge()
        with hw.stream_context(side):
            y = x * 2
        found = kinds(sanitizer)
        hw.synchronize()
        del y
        return found

    return run


def test_no_edge_is_a_race(handed_over):
    assert handed_over(lambda: None) == ["read after write"]


def test_waiting_for_the_stream_orders(hw, streams, handed_over):
    main, side = streams
    assert handed_over(lambda: hw.wait_stream(side, main)) == []


def test_waiting_the_wrong_way_round_does_not_order(hw, streams, handed_over):
    main, side = streams
    assert handed_over(lambda: hw.wait_stream(main, side)) == ["read after write"]


def test_an_event_orders(hw, streams, handed_over):
    main, side = streams
    event = hw.create_event()

    def edge():
        hw.record_event(event, main)
        hw.wait_event(event, side)

    assert handed_over(edge) == []


def test_streams_left_out_are_the_current_one(hw, streams, handed_over):
    _, side = streams
    event = hw.create_event()

    def edge():
        hw.record_event(event)
        with hw.stream_context(side):
            hw.wait_event(event)

    assert handed_over(edge) == []


def test_an_event_on_the_wrong_stream_does_not_order(hw, streams, handed_over):
    _, side = streams
    event = hw.create_event()

    def edge():
        hw.record_event(event, side)
        hw.wait_event(event, side)

    assert handed_over(edge) == ["read after write"]


def test_an_event_orders_only_what_came_before_it(hw, sanitizer, streams, zeros):
    main, side = streams
    x = zeros(8)
    event = hw.create_event()
    hw.record_event(event, main)
    x.add_(1)
    hw.wait_event(event, side)
    with hw.stream_context(side):
        y = x * 2
    assert kinds(sanitizer) == ["read after write"]
    hw.synchronize()
    del y


def test_recording_an_event_again_moves_it(hw, sanitizer, streams, handed_over):
    main, side = streams
    event = hw.create_event()
    hw.record_event(event, side)

    def edge():
        hw.record_event(event, main)
        hw.wait_event(event, side)

    assert handed_over(edge) == []


@pytest.mark.parametrize("how", ["device", "stream", "event", "query", "item"])
def test_the_host_waiting_orders_what_it_launches_then(hw, streams, handed_over, how):
    main, _ = streams
    event = hw.create_event()
    flag = torch.ones(1, device=hw.device())

    def edge():
        hw.record_event(event, main)
        if how == "device":
            hw.synchronize()
        elif how == "stream":
            hw.synchronize_stream(main)
        elif how == "event":
            hw.synchronize_event(event)
        elif how == "item":
            flag.item()
        else:
            main.synchronize()  # its own method: not seen
            assert hw.query_event(event)

    assert handed_over(edge) == []


def test_the_host_waits_for_the_latest_work_of_each_stream(hw, sanitizer, streams, zeros):
    main, side = streams
    x = zeros(8)
    x.add_(1)
    hw.wait_stream(side, main)
    x.add_(1)
    hw.synchronize()
    with hw.stream_context(side):
        y = x * 2
    assert kinds(sanitizer) == []
    hw.synchronize()
    del y


def test_asking_for_an_event_orders_only_if_it_was_reached(hw, streams, handed_over):
    main, _ = streams
    event, answers = hw.create_event(), []

    def edge():
        hw.record_event(event, main)
        answers.append(hw.query_event(event))

    found = handed_over(edge)
    assert found == ([] if answers[0] else ["read after write"])


def test_orders_are_passed_on(hw, sanitizer, streams, zeros):
    main, side = streams
    third = hw.create_stream()
    x = zeros(8)
    x.add_(1)
    hw.wait_stream(side, main)
    hw.wait_stream(third, side)
    with hw.stream_context(third):
        x.add_(1)
    assert kinds(sanitizer) == []
    hw.synchronize()


def test_one_stream_is_in_order_with_itself(hw, sanitizer, streams, zeros):
    _, side = streams
    with hw.stream_context(side):
        x = zeros(8)
        x.add_(1)
        y = x.sum()
    assert kinds(sanitizer) == []
    hw.synchronize()
    del y


def test_reads_of_two_streams_need_no_order(hw, sanitizer, streams, zeros):
    _, side = streams
    x = zeros(8)
    a = x * 2
    with hw.stream_context(side):
        b = x * 3
    assert kinds(sanitizer) == []
    hw.synchronize()
    del a, b


def test_write_after_read(hw, sanitizer, streams, zeros):
    _, side = streams
    x = zeros(8)
    with hw.stream_context(side):
        y = x * 2
    x.add_(1)
    assert kinds(sanitizer) == ["write after read"]
    hw.synchronize()
    del y


def test_write_after_write(hw, sanitizer, streams, zeros):
    _, side = streams
    x = zeros(8)
    with hw.stream_context(side):
        x.fill_(1)
    x.fill_(2)
    assert kinds(sanitizer) == ["write after write"]
    hw.synchronize()


def test_a_later_write_does_not_hide_an_earlier_race(hw, sanitizer, streams, zeros):
    main, side = streams
    x = zeros(8)
    x.add_(1)
    hw.wait_stream(side, main)
    x.mul_(2)
    with hw.stream_context(side):
        y = x * 2
    (race,) = sanitizer.take()
    assert race.previous.op == "aten::mul_"
    hw.synchronize()
    del y


def test_an_ordered_read_does_not_hide_a_write_from_a_third_stream(hw, sanitizer, streams, zeros):
    main, side = streams
    third = hw.create_stream()
    x = zeros(8)
    x.add_(1)
    hw.wait_stream(side, main)
    with hw.stream_context(side):
        y = x * 2
    with hw.stream_context(third):
        z = x * 3
    assert kinds(sanitizer) == ["read after write"]
    hw.synchronize()
    del y, z


def test_waiting_for_an_event_never_recorded_warns(hw, streams):
    _, side = streams
    event = hw.create_event()
    with pytest.warns(RaceWarning, match="`side` waits for nothing") as caught:
        hw.wait_event(event, side)
    assert caught[0].filename == __file__


def test_waiting_for_an_event_of_before_the_sanitizer_does_not_warn(hw):
    from hwcore.testing.sanitizer import Sanitizer

    event = hw.create_event()
    hw.record_event(event)
    with Sanitizer(hw), warnings.catch_warnings():
        warnings.simplefilter("error")
        hw.wait_event(event)


def test_work_of_before_the_sanitizer_is_not_reported(hw):
    from hwcore.testing.sanitizer import Sanitizer

    x = torch.zeros(8, device=hw.device())
    side = hw.create_stream()
    x.add_(1)
    with Sanitizer(hw), hw.stream_context(side):
        y = x * 2
    hw.synchronize()
    del y


def test_a_copy_between_devices_orders_their_streams(hw, sanitizer):
    if hw.device_count() < 2:
        pytest.skip("one device")
    here, there = hw.device(0), hw.device(1)
    x = torch.ones(8, device=here)
    y = x.to(there)
    (y + 1).sum()
    z = torch.zeros(8, device=here)
    z.copy_(y)
    z.add_(1)
    assert kinds(sanitizer) == []
    with hw.stream_context(hw.create_stream(here)):
        z.add_(1)
    z.to(there)
    assert kinds(sanitizer) == ["write after write", "read after write"]
    hw.synchronize(here)
    hw.synchronize(there)


class Slotted:
    """An object that takes no weak reference, like those of types written in C."""

    __slots__ = ()


def test_an_event_that_takes_no_weak_reference_orders(hw, sanitizer):
    clocks = sanitizer._tracker.clocks
    event = Slotted()
    clocks.event_made(event)
    assert clocks.is_unrecorded(event)
    lane, other = clocks.lane(hw.current_stream()), clocks.lane(hw.create_stream())
    clocks.record(event, lane)
    assert not clocks.is_unrecorded(event)
    clocks.acquire(other, clocks.snapshot(event))
    assert other.knows(lane, lane.epoch - 1)
    assert not clocks.is_unrecorded(Slotted())
