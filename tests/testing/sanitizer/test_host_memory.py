"""Host memory that a copy still reads or writes when the host touches it."""

from __future__ import annotations

import pytest
import torch

UP, DOWN = "to the device", "to the host"


@pytest.fixture
def pinned(hw, sanitizer):
    return hw.pin_memory(torch.arange(8.0))


@pytest.fixture
def copy(hw, zeros, pinned):
    """Start a copy between pinned memory and the device on the current stream."""
    device = zeros(8)

    def start(direction):
        target, source = (device, pinned) if direction == UP else (pinned, device)
        target.copy_(source, non_blocking=True)

    yield start
    hw.synchronize()


def kinds(sanitizer):
    return [race.kind for race in sanitizer.take()]


HOST_READS = {
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "item": lambda t: t[3].item(),
    "bool": lambda t: bool(t[0]),
}


@pytest.mark.parametrize("how", HOST_READS)
def test_reading_before_the_copy_ran(sanitizer, pinned, copy, how):
    copy(DOWN)
    HOST_READS[how](pinned)
    (race,) = sanitizer.take()
    assert race.kind == "host read before copy"
    assert race.current.stream == "the host"
    assert (race.previous.op, race.previous.write) == ("aten::copy_", True)
    assert race.missing_edge.startswith("the host never waited for `current` after aten::copy_")


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_writing_before_the_copy_ran(sanitizer, pinned, copy, direction):
    copy(direction)
    pinned.fill_(1)
    assert kinds(sanitizer) == ["host write before copy"]


@pytest.mark.parametrize("source", [torch.ones(8), torch.ones(8, dtype=torch.int32)])
def test_copying_into_it_before_the_copy_ran(sanitizer, pinned, copy, source):
    copy(UP)
    pinned.copy_(source)
    assert kinds(sanitizer) == ["host write before copy"]


def test_reading_what_a_copy_reads_is_no_race(sanitizer, pinned, copy):
    copy(UP)
    pinned.tolist()
    assert kinds(sanitizer) == []


def test_the_other_half_is_no_race(hw, sanitizer, pinned, zeros):
    zeros(4).copy_(pinned[:4], non_blocking=True)
    pinned[4:].fill_(1)
    assert kinds(sanitizer) == []
    hw.synchronize()


@pytest.mark.parametrize("wait", ["device", "stream", "event"])
def test_waiting_on_the_host_orders(hw, sanitizer, pinned, copy, wait):
    event = hw.create_event()
    copy(UP)
    hw.record_event(event)
    if wait == "device":
        hw.synchronize()
    elif wait == "stream":
        hw.synchronize_stream(hw.current_stream())
    else:
        hw.synchronize_event(event)
    pinned.fill_(1)
    assert kinds(sanitizer) == []


def test_waiting_on_a_stream_does_not_order_the_host(hw, sanitizer, streams, pinned, copy):
    main, side = streams
    copy(UP)
    hw.wait_stream(side, main)
    pinned.fill_(1)
    assert kinds(sanitizer) == ["host write before copy"]


def test_a_blocking_copy_has_run_when_it_returns(hw, sanitizer, pinned, zeros):
    x = zeros(8)
    x.copy_(pinned)
    pinned.fill_(1)
    assert kinds(sanitizer) == []
    hw.synchronize()


def test_a_read_back_makes_the_host_wait_for_the_stream(hw, sanitizer, streams, pinned, copy):
    copy(UP)
    torch.ones(3, device=hw.device()).cpu()
    pinned.fill_(1)
    assert kinds(sanitizer) == []


def test_pinning_is_no_access_by_a_stream(hw, sanitizer):
    block = hw.pin_memory(torch.zeros(8))
    block.fill_(1)
    assert kinds(sanitizer) == []


def test_two_streams_sharing_one_block(hw, sanitizer, streams, pinned, copy, zeros):
    _, side = streams
    other = zeros(8)
    copy(DOWN)
    with hw.stream_context(side):
        other.copy_(pinned, non_blocking=True)
    assert kinds(sanitizer) == ["read after write"]


def test_freeing_before_the_copy_ran(hw, sanitizer, zeros):
    x = zeros(8)
    block = hw.pin_memory(torch.arange(8.0))
    x.copy_(block, non_blocking=True)
    del block
    found = kinds(sanitizer)
    waits = hw.host_memory_policy().reuse_waits_for_copy
    assert found == ([] if waits else ["pinned memory freed before copy"])
    hw.synchronize()


def test_freeing_after_an_event_was_reached(hw, sanitizer, zeros):
    x = zeros(8)
    event = hw.create_event()
    block = hw.pin_memory(torch.arange(8.0))
    x.copy_(block, non_blocking=True)
    hw.record_event(event)
    while not hw.query_event(event):
        hw.synchronize_event(event)
    del block
    assert kinds(sanitizer) == []


@pytest.fixture
def separate(hw):
    """Skip where host and device memory are the same."""
    if hw.device().type == "cpu":
        pytest.skip("the device is the host: only pinned memory is known to be host memory")


def test_pageable_memory_is_read_before_the_call_returns(hw, sanitizer, separate, zeros):
    x, block = zeros(8), torch.arange(8.0)
    x.copy_(block, non_blocking=True)
    block.fill_(1)
    del block
    assert kinds(sanitizer) == []
    hw.synchronize()


def test_handing_pageable_memory_over_does_not_wait_for_the_stream(
    hw, sanitizer, separate, pinned, copy, zeros
):
    x = zeros(8)
    copy(UP)
    x.copy_(torch.arange(8.0), non_blocking=True)
    pinned.fill_(1)
    assert kinds(sanitizer) == ["host write before copy"]


def test_a_result_on_the_host_that_was_not_waited_for(hw, sanitizer, separate, zeros):
    there = zeros(8).to("cpu", non_blocking=True)
    pinned = there.is_pinned()
    there.tolist()
    assert kinds(sanitizer) == (["host read before copy"] if pinned else [])
    hw.synchronize()


def test_what_the_host_does_with_its_own_memory_is_not_followed(hw, sanitizer, separate):
    before = len(sanitizer._tracker.histories)
    x = torch.ones(8) * 2 + 1
    x.tolist()
    assert len(sanitizer._tracker.histories) == before
