"""When queued work runs: the hazards that laziness shows, waits, events, drain policies."""

from __future__ import annotations

import gc
import resource
import time

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, CapabilityError

POISON = 0xDD


def values(tensor):
    return tensor.cpu().tolist()


def test_nothing_runs_before_something_waits_for_it(sim):
    x = torch.zeros(3, device="sim")
    y = x + 1
    assert sim.pending() == 2
    assert sim.peek(y).view(torch.uint8).tolist() == [POISON] * 12
    torch.accelerator.synchronize()
    assert sim.pending() == 0
    assert sim.peek(y).tolist() == [1, 1, 1]


def test_what_the_host_waits_for_is_told_in_order(sim):
    side, event = torch.Stream("sim"), torch.Event("sim")
    with sim.host_waits() as all_of_it:
        x = torch.tensor([1, 0], device="sim")
        with sim.host_waits() as waits:
            assert x.sum().item() == 1
            x.cpu()
            side.synchronize()
            event.record()
            event.synchronize()
            torch.accelerator.synchronize()
            x.nonzero()
    words = ["read a value", "copied to the host", "Stream.sync", "Event.sync", "called sync"]
    assert len(waits) == 6
    assert all(word in wait for word, wait in zip([*words, "nonzero"], waits, strict=True)), waits
    assert all_of_it[1:] == waits
    assert "from the host" in all_of_it[0]


def test_what_leaves_the_host_alone_is_no_wait(sim):
    pinned, side = torch.ones(2).pin_memory(), torch.Stream("sim")
    with sim.host_waits() as waits:
        x = pinned.to("sim", non_blocking=True) + 1
        pinned.copy_(x, non_blocking=True)
        side.wait_stream(torch.accelerator.current_stream())
        event = side.record_event()
        event.wait()
        event.query()
    assert waits == []
    assert sim.pending() > 0


def test_a_host_read_waits_for_the_current_stream_alone(sim):
    side = torch.Stream("sim")
    with side:
        torch.ones(2, device="sim")
    x = torch.ones(2, device="sim")
    assert x.sum().item() == 2
    assert sim.pending(side) == 1
    assert sim.pending(torch.accelerator.current_stream()) == 0


@pytest.mark.parametrize("waits", [False, True])
def test_a_missing_wait_gives_the_old_value(sim, waits):
    x = torch.ones(2, device="sim")
    torch.accelerator.synchronize()
    side = torch.Stream("sim")
    x.fill_(7)
    if waits:
        side.wait_stream(torch.accelerator.current_stream())
    with side:
        y = x * 10
    side.synchronize()
    assert sim.peek(y).tolist() == ([70, 70] if waits else [10, 10])


@pytest.mark.parametrize("waits", [False, True])
def test_overwriting_what_another_stream_still_reads_gives_the_new_value(sim, waits):
    x = torch.ones(2, device="sim")
    torch.accelerator.synchronize()
    side = torch.Stream("sim")
    with side:
        y = x * 10
    if waits:
        torch.accelerator.current_stream().wait_stream(side)
    x.fill_(7)
    torch.accelerator.current_stream().synchronize()
    side.synchronize()
    assert sim.peek(y).tolist() == ([10, 10] if waits else [70, 70])


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_freed_without_record_stream_is_reused_under_the_reader(sim, recorded):
    side = torch.Stream("sim")
    x = torch.ones(128, device="sim")
    torch.accelerator.synchronize()
    with side:
        y = x * 5
    if recorded:
        x.record_stream(side)
    address = x.data_ptr()
    del x
    z = torch.full((128,), -1.0, device="sim")
    assert (z.data_ptr() == address) is not recorded
    torch.accelerator.current_stream().synchronize()
    side.synchronize()
    assert sim.peek(y)[0].item() == (5 if recorded else -5)


def test_memory_that_was_freed_is_poisoned_for_whoever_still_reads_it(sim):
    side = torch.Stream("sim")
    x = torch.ones(128, device="sim")
    torch.accelerator.synchronize()
    with side:
        y = x + 0
    del x
    side.synchronize()
    assert sim.peek(y).view(torch.uint8).unique().tolist() == [POISON]


def test_a_copy_from_pinned_memory_reads_it_when_it_runs(sim):
    host = torch.ones(4).pin_memory()
    x = torch.empty(4, device="sim")
    x.copy_(host, non_blocking=True)
    host.fill_(2)
    assert values(x) == [2] * 4


@pytest.mark.parametrize("pinned", [False, True])
def test_a_copy_that_is_not_asynchronous_has_read_its_source_when_it_returns(sim, pinned):
    host = torch.ones(4).pin_memory() if pinned else torch.ones(4)
    x = torch.empty(4, device="sim")
    x.copy_(host, non_blocking=not pinned)
    host.fill_(2)
    assert values(x) == [1] * 4


def test_a_copy_to_pinned_memory_arrives_when_it_runs(sim):
    host = torch.zeros(4).pin_memory()
    host.copy_(torch.ones(4, device="sim"), non_blocking=True)
    assert host.tolist() == [0] * 4
    torch.accelerator.synchronize()
    assert host.tolist() == [1] * 4


def test_a_copy_between_devices_is_ordered_with_both_streams(sim):
    x = torch.arange(3.0, device="sim:0")
    y = x.to("sim:1")
    x.fill_(9)
    torch.accelerator.synchronize(0)
    assert values(y) == [0, 1, 2]


# --- Events --------------------------------------------------------------------------------------


def test_an_event_is_a_position_in_its_stream(sim):
    stream, event = torch.accelerator.current_stream(), torch.Event("sim")
    x = torch.zeros(1, device="sim")
    event.record()
    x.add_(1)
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert sim.peek(x).item() == 0
    assert sim.pending(stream) == 1


def test_an_event_never_recorded_is_waited_for_by_nobody(sim):
    event = torch.Event("sim")
    torch.accelerator.current_stream().wait_event(event)
    event.wait()
    event.synchronize()
    assert event.query()
    assert sim.pending() == 0


def test_an_event_recorded_again_is_the_later_position(sim):
    side, event = torch.Stream("sim"), torch.Event("sim")
    x = torch.zeros(1, device="sim")
    event.record()
    x.add_(1)
    event.record()
    side.wait_event(event)
    side.synchronize()
    assert sim.peek(x).item() == 1


def test_a_wait_is_for_the_recording_at_its_time(sim):
    side, event = torch.Stream("sim"), torch.Event("sim")
    x = torch.zeros(1, device="sim")
    event.record()
    side.wait_event(event)
    x.add_(1)
    event.record()
    side.synchronize()
    assert sim.peek(x).item() == 0


def test_polling_an_event_is_waiting_for_it_in_the_end(sim):
    event = torch.Event("sim")
    torch.ones(1, device="sim")
    event.record()
    polls = 1
    while not event.query():
        polls += 1
    assert polls == 100


def test_timed_events_tell_how_long_the_work_between_them_took(sim):
    start, end = (torch.Event("sim", enable_timing=True) for _ in range(2))
    start.record()
    sim.launch_host_function(lambda: time.sleep(0.02))
    end.record()
    time.sleep(0.2)  # not of the device's time: nothing runs
    torch.accelerator.synchronize()
    assert 20 <= start.elapsed_time(end) < 150


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda e: None, "must be recorded"),
        (lambda e: e.record(), "must be completed"),
        (lambda e: (e.record(), e.synchronize()), "timing"),
    ],
)
def test_the_time_of_an_event_that_has_none_is_an_error(sim, prepare, problem):
    start = torch.Event("sim", enable_timing=True)
    start.record()
    start.synchronize()
    end = torch.Event("sim", enable_timing=problem != "timing")
    torch.ones(1, device="sim")
    prepare(end)
    with pytest.raises((RuntimeError, ValueError), match=problem):
        start.elapsed_time(end)
    assert values(torch.ones(1, device="sim")) == [1]


def test_an_event_belongs_to_the_device_of_its_first_recording(sim):
    event = torch.Event("sim")
    event.record(torch.Stream("sim:0"))
    with pytest.raises(RuntimeError, match="expected one of sim:0, the event's device"):
        event.record(torch.Stream("sim:1"))
    event.record(torch.Stream("sim:0"))


# --- Waits ---------------------------------------------------------------------------------------


def test_ten_thousand_waits_back_and_forth_do_not_overflow(sim):
    here, there = torch.accelerator.current_stream(), torch.Stream("sim")
    x = torch.zeros(1, device="sim")
    for _ in range(10_000):
        x.add_(1)
        there.wait_stream(here)
        with there:
            x.add_(1)
        here.wait_stream(there)
    here.synchronize()
    assert sim.peek(x).item() == 20_000


def test_a_chain_through_a_thousand_streams_runs_in_order(sim):
    x = torch.zeros(1, device="sim")
    before = torch.accelerator.current_stream()
    for _ in range(1_000):
        stream = torch.Stream("sim")
        stream.wait_stream(before)
        with stream:
            x.add_(1)
        before = stream
    before.synchronize()
    assert sim.peek(x).item() == 1_000


def test_work_that_waits_for_its_own_stream_is_an_error_not_a_hang(sim):
    sim.launch_host_function(lambda: torch.accelerator.current_stream().synchronize())
    with pytest.raises(CapabilityError, match="waits for itself"):
        torch.accelerator.synchronize()
    assert values(torch.ones(1, device="sim")) == [1]


def test_streams_that_wait_for_each_other_are_an_error_not_a_hang(sim):
    one, other = torch.Stream("sim"), torch.Stream("sim")
    sim.launch_host_function(lambda: other.synchronize(), one)
    other.wait_stream(one)
    with pytest.raises(CapabilityError, match="waits for itself"):
        one.synchronize()
    other.synchronize()
    assert sim.pending() == 0


def test_the_device_as_a_whole_runs_streams_of_low_priority_numbers_first(sim):
    order = []
    for priority in (0, 1, -1):
        stream = torch.Stream("sim", priority=priority)
        sim.launch_host_function(lambda p=priority: order.append(p), stream)
    torch.accelerator.synchronize()
    assert order == [-1, 0, 1]


# --- Errors of queued work -----------------------------------------------------------------------


def bad_index():
    x = torch.zeros(4, device="sim")
    return x[torch.tensor([9]).to("sim")]


def test_an_error_surfaces_at_the_next_synchronisation_and_names_the_operator(sim):
    bad_index()
    with pytest.raises(IndexError, match=r"index 9 is out of bounds.*raised by aten::index"):
        torch.accelerator.synchronize()


def test_an_error_surfaces_once_and_leaves_the_device_usable(sim):
    bad_index()
    with pytest.raises(IndexError):
        torch.accelerator.synchronize()
    torch.accelerator.synchronize()
    assert values(torch.ones(2, device="sim")) == [1, 1]


def test_an_error_surfaces_on_its_own_stream_even_if_another_made_it_run(sim):
    side = torch.Stream("sim")
    with side:
        bad_index()
    torch.accelerator.current_stream().wait_stream(side)
    torch.accelerator.current_stream().synchronize()
    assert sim.pending() == 0
    with pytest.raises(IndexError):
        side.synchronize()


def test_work_behind_a_failed_one_still_runs(sim):
    bad_index()
    y = torch.ones(1, device="sim") + 1
    with pytest.raises(IndexError):
        y.item()
    assert sim.peek(y).item() == 2


def test_of_several_errors_the_first_is_raised(sim):
    for text in ("first", "second"):
        sim.launch_host_function(lambda text=text: int(text))
    with pytest.raises(ValueError, match="first"):
        torch.accelerator.synchronize()
    torch.accelerator.synchronize()


def test_waiting_for_an_event_raises_what_its_stream_raised(sim):
    bad_index()
    event = torch.accelerator.current_stream().record_event()
    with pytest.raises(IndexError):
        event.synchronize()


def test_a_wrong_shape_is_an_error_at_the_call(sim):
    with pytest.raises(RuntimeError, match="must match"):
        torch.zeros(2, device="sim") + torch.zeros(3, device="sim")


# --- Drain policies ------------------------------------------------------------------------------


def test_under_eager_work_runs_when_it_is_submitted(sim):
    with sim.drain_policy("eager"):
        assert sim.peek(torch.zeros(2, device="sim") + 1).tolist() == [1, 1]
        with pytest.raises(IndexError):
            bad_index()


def test_becoming_eager_runs_what_is_queued(sim):
    x = torch.ones(2, device="sim")
    with sim.drain_policy("eager"):
        assert sim.peek(x).tolist() == [1, 1]


def test_one_stream_can_be_eager_alone(sim):
    side = torch.Stream("sim")
    with sim.drain_policy("eager", side):
        assert sim.get_drain_policy(side) == "eager"
        assert sim.get_drain_policy() == "lazy"
        x = torch.ones(2, device="sim")
        with side:
            y = torch.ones(2, device="sim")
        assert sim.peek(y).tolist() == [1, 1]
        assert sim.pending() == 1
    assert sim.get_drain_policy(side) == "lazy"
    assert values(x) == [1, 1]


def test_an_eager_stream_runs_what_it_waits_for(sim):
    side = torch.Stream("sim")
    x = torch.ones(2, device="sim")
    with sim.drain_policy("eager", side):
        side.wait_stream(torch.accelerator.current_stream())
        assert sim.peek(x).tolist() == [1, 1]


def unordered(seed, sim):
    """Which of three unordered writers wins."""
    with sim.drain_policy(f"random:{seed}"):
        x = torch.zeros(1, device="sim")
        torch.accelerator.synchronize()
        trace = []
        for value in (1, 2, 3):
            with torch.Stream("sim"):
                x.fill_(value)
                trace.append(sim.peek(x).item())
        torch.accelerator.synchronize()
        return (*trace, x.item())


def test_a_random_order_is_the_same_for_the_same_seed(sim):
    for seed in range(5):
        assert unordered(seed, sim) == unordered(seed, sim)


def test_other_seeds_give_other_orders(sim):
    assert len({unordered(seed, sim) for seed in range(20)}) > 3


def test_a_random_order_keeps_waits(sim):
    for seed in range(20):
        with sim.drain_policy(f"random:{seed}"):
            x = torch.zeros(1, device="sim")
            before = torch.accelerator.current_stream()
            for value in (2, 3, 5):
                stream = torch.Stream("sim")
                stream.wait_stream(before)
                with stream:
                    x.mul_(10).add_(value)
                before = stream
            before.synchronize()
            assert sim.peek(x).item() == 235


@pytest.mark.parametrize("policy", ["Lazy", "", "random", "random:", "random:-1", "random:x"])
def test_an_unknown_policy_is_an_error_and_changes_nothing(sim, policy):
    with pytest.raises(ArgumentValueError, match='expected "lazy", "eager" or "random:SEED"'):
        sim.set_drain_policy(policy)
    assert sim.get_drain_policy() == "lazy"
    assert values(torch.ones(1, device="sim")) == [1]


@pytest.mark.parametrize("policy", [None, 3])
def test_a_policy_that_is_no_text_is_an_error(sim, policy):
    with pytest.raises(ArgumentTypeError, match="drain policy"):
        sim.set_drain_policy(policy)


def test_a_random_order_leaves_a_stream_with_a_policy_of_its_own_alone(sim):
    lazy = torch.Stream("sim")
    sim.set_drain_policy("lazy", lazy)
    for seed in range(5):
        with sim.drain_policy(f"random:{seed}"):
            with lazy:
                x = torch.ones(2, device="sim")
            for _ in range(10):
                torch.ones(2, device="sim")
            assert sim.pending(lazy) == seed + 1
    lazy.synchronize()
    assert sim.peek(x).tolist() == [1, 1]


def test_one_stream_cannot_have_a_random_order(sim):
    with pytest.raises(ArgumentValueError, match="Set it for the device"):
        sim.set_drain_policy("random:1", torch.Stream("sim"))


def test_a_policy_is_for_streams_of_this_device_alone(sim):
    with pytest.raises(ArgumentTypeError, match="expected a stream of the device `sim`"):
        sim.set_drain_policy("eager", object())


# --- Reset ---------------------------------------------------------------------------------------


def test_reset_drops_what_is_queued_and_what_went_wrong(sim):
    x = torch.zeros(1, device="sim")
    torch.accelerator.synchronize()
    bad_index()
    x.add_(1)
    sim.reset()
    assert sim.pending() == 0
    torch.accelerator.synchronize()
    assert values(x) == [0]


def test_a_stream_from_before_a_reset_says_so(sim):
    stream = torch.Stream("sim")
    sim.reset()
    for use in (
        stream.synchronize,
        stream.query,
        stream.record_event,
        lambda: stream.wait_stream(torch.accelerator.current_stream()),
        lambda: sim.pending(stream),
    ):
        with pytest.raises(CapabilityError, match=r"was created before reset\(0\)"):
            use()


def test_work_on_a_stream_from_before_a_reset_is_an_error(sim):
    stream = torch.Stream("sim")
    sim.reset()
    with stream, pytest.raises(CapabilityError, match="was created before reset"):
        torch.ones(1, device="sim")
    assert values(torch.ones(1, device="sim")) == [1]


def test_an_event_from_before_a_reset_says_so_until_it_is_recorded_again(sim):
    event = torch.accelerator.current_stream().record_event()
    sim.reset()
    for use in (event.query, event.synchronize, event.wait):
        with pytest.raises(CapabilityError, match=r"was recorded before reset\(0\)"):
            use()
    event.record()
    event.synchronize()


def test_after_a_reset_new_streams_and_old_tensors_work(sim):
    x = torch.ones(2, device="sim")
    torch.accelerator.synchronize()
    sim.reset()
    with torch.Stream("sim") as stream:
        x.add_(1)
    stream.synchronize()
    assert sim.peek(x).tolist() == [2, 2]


def test_a_reset_of_one_device_leaves_the_other_alone(sim):
    stream = torch.Stream("sim:1")
    with stream:
        x = torch.ones(1, device="sim:1")
    sim.reset(0)
    stream.synchronize()
    assert sim.peek(x).item() == 1


@pytest.mark.parametrize("index", [2, -1])
def test_a_reset_of_a_device_that_is_not_there_is_an_error(sim, index):
    with pytest.raises(ArgumentValueError, match="expected 0 to 1"):
        sim.reset(index)


# --- Long runs -----------------------------------------------------------------------------------


def test_memory_stays_flat_over_ten_thousand_steps_of_two_streams(sim):
    here, side = torch.accelerator.current_stream(), torch.Stream("sim")

    def steps(count):
        for step in range(count):
            x = torch.ones(64, device="sim")
            side.wait_stream(here)
            with side:
                y = x * 2
                x.record_stream(side)
            here.wait_stream(side)
            y.record_stream(here)
            y.add_(1)
            if step % 100 == 99:
                here.synchronize()

    steps(1_000)
    gc.collect()
    reserved = torch.accelerator.memory_reserved()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps(10_000)
    assert torch.accelerator.memory_reserved() == reserved
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 2_048  # KiB
