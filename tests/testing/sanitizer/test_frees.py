"""Memory that its stream gets back while another stream still uses it."""

from __future__ import annotations

import gc

import pytest
import torch

from hwcore.testing.sanitizer import RaceError, Sanitizer


def used_elsewhere(hw, side):
    """Return a tensor of the current stream that `side` has read, in order."""
    x = torch.ones(64, device=hw.device())
    hw.wait_stream(side, hw.current_stream())
    with hw.stream_context(side):
        y = x * 2
    return x, y


def test_a_free_without_record_stream(hw, sanitizer, streams):
    _, side = streams
    x, y = used_elsewhere(hw, side)
    del x
    hw.synchronize()
    (race,) = sanitizer.take()
    assert race.kind == "freed while in use"
    assert (race.current.op, race.current.stream) == ("free", "`main`")
    assert (race.previous.op, race.previous.stream) == ("aten::mul", "`side`")
    assert "test_a_free_without_record_stream" in race.current.stack[0]
    assert "backend.record_stream(tensor, side)" in race.missing_edge
    del y


def test_record_stream_allows_the_free(hw, sanitizer, streams):
    _, side = streams
    x, y = used_elsewhere(hw, side)
    hw.record_stream(x, side)
    del x
    hw.synchronize()
    assert sanitizer.take() == []
    del y


def test_record_stream_of_a_view_is_one_of_the_storage(hw, sanitizer, streams):
    _, side = streams
    x, y = used_elsewhere(hw, side)
    hw.record_stream(x[3:5], side)
    del x
    hw.synchronize()
    assert sanitizer.take() == []
    del y


def test_record_stream_for_another_stream_does_not(hw, sanitizer, streams):
    main, side = streams
    x, y = used_elsewhere(hw, side)
    hw.record_stream(x, main)
    del x
    hw.synchronize()
    assert [race.kind for race in sanitizer.take()] == ["freed while in use"]
    del y


def test_waiting_before_the_free_allows_it(hw, sanitizer, streams):
    main, side = streams
    x, y = used_elsewhere(hw, side)
    hw.wait_stream(main, side)
    del x
    hw.synchronize()
    assert sanitizer.take() == []
    del y


def test_waiting_after_the_free_is_too_late(hw, sanitizer, streams):
    main, side = streams
    x, y = used_elsewhere(hw, side)
    del x
    hw.wait_stream(main, side)
    assert [race.kind for race in sanitizer.take()] == ["freed while in use"]
    hw.synchronize()
    del y


def test_a_view_keeps_the_storage_alive(hw, sanitizer, streams):
    main, side = streams
    x, y = used_elsewhere(hw, side)
    view = x[5:]
    del x
    hw.wait_stream(main, side)
    del view
    hw.synchronize()
    assert sanitizer.take() == []
    del y


def test_a_free_by_the_garbage_collector_while_the_lock_is_held(hw, sanitizer, streams):
    _, side = streams
    x, y = used_elsewhere(hw, side)
    cycle = [x]
    cycle.append(cycle)
    del x, cycle
    with sanitizer._tracker.lock:
        gc.collect()
    assert [race.kind for race in sanitizer.take()] == ["freed while in use"]
    hw.synchronize()
    del y


def test_a_finaliser_that_uses_tensors_while_the_lock_is_held(hw, sanitizer, streams):
    class Late:
        def __del__(self):
            done.append(torch.ones(3, device=hw.device()) + 1)
            hw.synchronize()

    done = []
    with sanitizer._tracker.lock:
        Late()
    assert len(done) == 1
    assert sanitizer.take() == []


def test_the_free_is_raised_at_the_next_call(hw):
    with Sanitizer(hw, on_race="raise"):
        side = hw.create_stream()
        x, y = used_elsewhere(hw, side)
        del x
        with pytest.raises(RaceError, match="freed while in use"):
            torch.ones(1, device=hw.device())
        hw.synchronize()
        del y


def test_the_last_free_is_raised_on_leaving(hw):
    def program():
        side = hw.create_stream()
        x, y = used_elsewhere(hw, side)
        del x
        return y

    with pytest.raises(RaceError, match="freed while in use"), Sanitizer(hw, on_race="raise"):
        program()
    hw.synchronize()


def test_what_was_freed_on_its_own_stream_is_in_order(hw, sanitizer, streams):
    _, side = streams
    for _ in range(3):
        with hw.stream_context(side):
            y = torch.ones(8, device=hw.device()) * 2 + 1
            del y
    assert sanitizer.take() == []
    hw.synchronize()


def test_a_storage_that_set_lets_go_of_is_freed(hw, sanitizer, streams):
    _, side = streams
    x, y = used_elsewhere(hw, side)
    x.set_(torch.empty(1, device=hw.device()))
    hw.synchronize()
    assert [race.kind for race in sanitizer.take()] == ["freed while in use"]
    del y
