"""A program of which the sanitizer reports nothing has one value, in whatever order it runs.

Random programs over three streams, checked by running them in the orders that the simulated
device can be told to take. Elsewhere there is one order, and the programs only have to run.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from hwcore.testing.sanitizer import Sanitizer

STREAM, BUFFER = st.integers(0, 2), st.integers(0, 2)
STEP = st.one_of(
    st.tuples(st.just("combine"), STREAM, BUFFER, BUFFER),
    st.tuples(st.just("combine"), STREAM, BUFFER, BUFFER),
    st.tuples(st.just("every other"), STREAM, BUFFER, st.integers(0, 1)),
    st.tuples(st.just("replace"), STREAM, BUFFER, BUFFER),
    st.tuples(st.just("upload"), STREAM, BUFFER, BUFFER),
    st.tuples(st.just("host write"), STREAM, BUFFER, BUFFER),
    st.tuples(st.just("record stream"), STREAM, BUFFER, BUFFER),
    st.tuples(st.just("wait stream"), STREAM, STREAM, BUFFER),
    st.tuples(st.just("wait stream"), STREAM, STREAM, BUFFER),
    st.tuples(st.just("record event"), STREAM, BUFFER, BUFFER),
    st.tuples(st.just("wait event"), STREAM, BUFFER, BUFFER),
    st.tuples(st.just("synchronize stream"), STREAM, BUFFER, BUFFER),
    st.tuples(st.just("synchronize event"), STREAM, BUFFER, BUFFER),
)


def run(hw, steps):
    """Run a program and return the contents of its buffers at the end."""
    device = hw.device()
    streams = [hw.current_stream(), hw.create_stream(), hw.create_stream()]
    done = hw.create_event()
    buffers = [torch.full((8,), n + 1, device=device) for n in range(3)]
    block = hw.pin_memory(torch.zeros(8, dtype=torch.long))
    hw.record_event(done)
    hw.synchronize()
    for number, (what, a, b, c) in enumerate(steps):
        with hw.stream_context(streams[a]):
            if what == "combine":
                buffers[b].mul_(3).add_(buffers[c])
            elif what == "every other":
                buffers[b][c::2].mul_(5)
            elif what == "replace":
                buffers[b] = torch.full((8,), number, device=device)
            elif what == "upload":
                buffers[b].copy_(block, non_blocking=True)
            elif what == "host write":
                block.fill_(number)
            elif what == "record stream":
                hw.record_stream(buffers[b], streams[a])
            elif what == "wait stream":
                hw.wait_stream(streams[a], streams[b])
            elif what == "record event":
                hw.record_event(done)
            elif what == "wait event":
                hw.wait_event(done)
            elif what == "synchronize stream":
                hw.synchronize_stream(streams[a])
            elif what == "synchronize event":
                hw.synchronize_event(done)
    hw.synchronize()
    return [buffer.tolist() for buffer in buffers]


@pytest.fixture(scope="module")
def draining(hw):
    if hw.info.name != "sim":
        return lambda policy: contextlib.nullcontext()
    from hwcore_sim import device

    return device.drain_policy


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(STEP, min_size=2, max_size=12))
def test_without_a_report_every_order_gives_the_same(hw, draining, steps):
    with draining("eager"):
        expected = run(hw, steps)
    with Sanitizer(hw, on_race="collect") as sanitizer:
        run(hw, steps)
    event("reported" if sanitizer.races else "silent")
    assume(not sanitizer.races)
    for policy in ("lazy", "random:1", "random:2", "random:3"):
        with draining(policy):
            assert run(hw, steps) == expected, policy
