"""Streams that share a map: whatever order work runs in, nobody reads what is not there yet or
overwrites what somebody still reads."""

import pytest
import torch

from hwcore.overlap import FutureMap, PlanStream, RelayPayload, RelaySpec

from ._payloads import expected, payload, values
from .conftest import SIZES

pytestmark = pytest.mark.usefixtures("in_any_order", "watched")


@pytest.fixture(params=[False, True], ids=["plain", "debug"])
def relay(request, relay_of):
    return relay_of(request.param, **SIZES)


@pytest.fixture
def forward(hw):
    """A stream for the forward; the current one schedules."""
    return hw.create_stream()


def test_a_step_reads_what_another_stream_stashed(hw, relay, rows, forward):
    batch, given = rows(3, 5), payload(relay.spec, [30, 50], relay.device)
    hw.wait_stream(forward, hw.current_stream())
    with hw.stream_context(forward):
        relay.stash(batch, given)
    assert values(relay.resolve(rows(5, 3))) == expected(relay.spec, [50, 30])
    hw.synchronize()


def test_the_schedule_stream_reads_lengths_that_the_forward_published(hw, relay, rows, forward):
    batch, lens = rows(3, 5), rows(30, 50)
    hw.wait_stream(forward, hw.current_stream())
    with hw.stream_context(forward):
        relay.publish(batch, lens)
    assert relay.resolve_seq_lens(rows(5, 3)).tolist() == [50, 30]
    assert relay.resolve_seq_lens(rows(5, 3), to_cpu=True).tolist() == [50, 30]
    hw.synchronize()


def test_lengths_wait_for_their_publish_and_for_nothing_after_it(hw, rows, forward, late):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells what has run")
    from hwcore_sim import device

    relay = FutureMap(RelaySpec(12), backend=hw, debug=False)
    batch, lens = rows(3), rows(30)
    hw.wait_stream(forward, hw.current_stream())
    ran = []
    with hw.stream_context(forward), device.drain_policy("lazy"):
        relay.publish(batch, lens)
        device.launch_host_function(lambda: ran.append("the rest of the forward"))
        relay.stash(batch, RelayPayload(lens))
    with device.drain_policy("lazy"):
        assert relay.resolve_seq_lens(rows(3), to_cpu=True).tolist() == [30]
        assert ran == []
    hw.synchronize()
    relay.close()


def test_publishes_of_two_streams_are_both_waited_for(hw, relay, rows, forward):
    other = hw.create_stream()
    batches = {forward: (rows(3), rows(30)), other: (rows(5), rows(50))}
    for stream, (batch, lens) in batches.items():
        hw.wait_stream(stream, hw.current_stream())
        with hw.stream_context(stream):
            relay.publish(batch, lens)
    assert relay.resolve_seq_lens(rows(3, 5)).tolist() == [30, 50]
    hw.synchronize()


def test_a_publish_waits_for_those_who_still_read_the_lengths(hw, relay, rows, forward):
    batch, first, second = rows(3), rows(30), rows(31)
    relay.publish(batch, first)
    hw.wait_stream(forward, hw.current_stream())
    lens = relay.resolve_seq_lens(batch)
    with hw.stream_context(forward):
        relay.publish(batch, second)
    assert lens.tolist() == [30]
    hw.synchronize()


def overlapped(hw, relay, rows, forward, steps):
    """Decode: each step adds one to its token; step n+1 is scheduled while step n runs."""
    batch, tokens = rows(3, 5), []
    relay.stash(batch, payload(relay.spec, [0, 100], relay.device))
    relay.publish(batch, rows(0, 0))
    hw.wait_stream(forward, hw.current_stream())
    with hw.stream_context(forward):
        lens = torch.zeros_like(batch)
    for step in range(steps):
        with hw.stream_context(forward):
            got = relay.resolve(batch)
            token = got.next_token + 1
            lens = lens + 1
            relay.publish(batch, lens)
            fields = {name: getattr(got, name) for name in RelayPayload.__slots__}
            relay.stash(batch, RelayPayload(**{**fields, "next_token": token}))
            tokens.append(token)
        assert relay.resolve_seq_lens(batch, to_cpu=True).tolist() == [step + 1, step + 1]
    hw.synchronize()
    return [token.tolist() for token in tokens]


def test_an_overlapped_loop_gives_what_one_step_after_the_other_gives(hw, relay, rows, forward):
    got = overlapped(hw, relay, rows, forward, steps=6)
    assert got == [[step, 100 + step] for step in range(1, 7)]


def test_what_the_main_stream_reads_of_a_plan_is_not_overwritten(hw, relay, rows):
    """Step n+1 is resolved on the plan stream while the main stream reads step n's payload."""
    plan = PlanStream(backend=hw, enabled=True)
    batch, seen = rows(3), []
    relay.stash(batch, payload(relay.spec, [1], relay.device))
    for number in range(2, 8):
        next_payload = payload(relay.spec, [number], relay.device)
        with plan.block(batch) as outputs:
            outputs["payload"] = relay.resolve(batch)
        got = plan.join().outputs["payload"]
        copies = {name: getattr(got, name).clone() for name in RelayPayload.__slots__}
        seen.append(RelayPayload(**copies))
        del got
        relay.stash(batch, next_payload)
    assert [values(one) for one in seen] == [expected(relay.spec, [n]) for n in range(1, 7)]
    hw.synchronize()


def test_resolves_of_two_streams_share_the_memory_in_turn(hw, relay, rows, forward):
    hw.wait_stream(forward, hw.current_stream())
    batches = [rows(row) for row in range(1, 9)]
    for row, batch in enumerate(batches, 1):
        relay.stash(batch, payload(relay.spec, [10 * row], relay.device))
    for row, batch in enumerate(batches, 1):
        with hw.stream_context(forward if row % 2 else hw.current_stream()):
            assert values(relay.resolve(batch)) == expected(relay.spec, [10 * row])
    hw.synchronize()


def test_memory_that_was_replaced_is_kept_until_its_stream_is_done(hw, relay, rows, forward):
    batches = [rows(row) for row in (1, 2, 3)]
    given = [payload(relay.spec, [10 * row], relay.device) for row in (1, 2, 3)]
    hw.wait_stream(forward, hw.current_stream())
    with hw.stream_context(forward):
        for batch, one in zip(batches, given, strict=True):
            relay.stash(batch, one)
        held = relay.resolve(batches[0])
        relay.resolve(batches[1])
        got = relay.resolve(batches[2]).next_token + 1
    del held
    filler = torch.full((12, 64), -9, device=relay.device)  # what was freed may be had again
    hw.wait_stream(hw.current_stream(), forward)
    assert got.tolist() == [31]
    assert filler.sum().item() == -9 * 12 * 64
    hw.synchronize()


def test_a_map_may_be_closed_while_a_stream_still_works_on_it(hw, relay, rows, forward):
    batch, given = rows(3), payload(relay.spec, [1], relay.device)
    hw.wait_stream(forward, hw.current_stream())
    with hw.stream_context(forward):
        relay.stash(batch, given)
        got = relay.resolve(batch).next_token + 1
    relay.close()
    filler = torch.full((64, 64), -9, device=relay.device)  # what was freed may be had again
    hw.wait_stream(hw.current_stream(), forward)
    assert got.tolist() == [2]
    assert filler.sum().item() == -9 * 64 * 64
    hw.synchronize()
