"""Whatever is done in whatever order, a map is a dict of rows: Hypothesis against that dict.

Two streams take turns at will, up to two iterations are in flight, rows are retracted and reused.
"""

import contextlib

import hypothesis
import pytest
import torch
from hypothesis import stateful
from hypothesis import strategies as st

import hwcore
from hwcore.errors import ConsumeOnceError
from hwcore.overlap import FutureMap, RelaySpec
from hwcore.testing.sanitizer import Sanitizer

from ._payloads import expected, payload, values

ROWS = 8
SPEC = RelaySpec(pool_size=ROWS, topk=1, hidden_size=3)
batches = st.lists(st.integers(1, ROWS - 1), unique=True, max_size=ROWS - 1)
padding = st.integers(0, 1)
streams = st.integers(0, 1)


class Relay(stateful.RuleBasedStateMachine):
    """The map, and what it should hold."""

    debug = False

    def __init__(self):
        super().__init__()
        self.hw = hwcore.current_backend()
        self.exits = contextlib.ExitStack()
        self.exits.enter_context(Sanitizer(self.hw))
        self.relay = FutureMap(SPEC, backend=self.hw, debug=self.debug)
        self.streams = [self.hw.current_stream(), self.hw.create_stream()]
        self.full = {}  # row: number
        self.lens = dict.fromkeys(range(ROWS), 0)
        self.numbers = iter(range(1, 10**6))
        self.in_flight = []

    def tensor(self, numbers, dtype=torch.int64):
        return torch.tensor(numbers, dtype=dtype, device=self.relay.device)

    def on(self, which):
        return self.hw.stream_context(self.streams[which])

    @stateful.rule(batch=batches, pad=padding, stream=streams)
    def stash(self, batch, pad, stream):
        batch = [row for row in batch if row not in self.full]
        numbers = [next(self.numbers) for _ in batch]
        self.full.update(zip(batch, numbers, strict=True))
        with self.on(stream):
            given = payload(SPEC, numbers + [-1] * pad, self.relay.device)
            self.relay.stash(self.tensor(batch + [0] * pad), given)

    @stateful.rule(batch=batches, pad=padding, stream=streams)
    def resolve(self, batch, pad, stream):
        batch = [row for row in batch if row in self.full] + [0] * pad
        wanted = expected(SPEC, [self.full.pop(row, None) for row in batch])
        with self.on(stream):
            got = self.relay.resolve(self.tensor(batch, torch.int32))
        self.in_flight.append((stream, got, wanted))
        if len(self.in_flight) > 1:
            self.look()

    @stateful.precondition(lambda self: self.in_flight)
    @stateful.rule()
    def look(self):
        """Read the older payload, on the stream that resolved it."""
        stream, got, wanted = self.in_flight.pop(0)
        with self.on(stream):
            assert values(got) == wanted

    @stateful.rule(batch=batches, stream=streams)
    def publish(self, batch, stream):
        lens = [next(self.numbers) for _ in batch]
        self.lens.update(zip(batch, lens, strict=True))
        with self.on(stream):
            self.relay.publish(self.tensor(batch), self.tensor(lens))

    @stateful.rule(batch=batches, stream=streams, to_cpu=st.booleans())
    def resolve_seq_lens(self, batch, stream, to_cpu):
        with self.on(stream):
            got = self.relay.resolve_seq_lens(self.tensor([0, *batch]), to_cpu=to_cpu)
            assert got.tolist() == [0, *(self.lens[row] for row in batch)]

    @stateful.rule(batch=batches, stream=streams)
    def retract(self, batch, stream):
        for row in batch:
            self.full.pop(row, None)
        with self.on(stream):
            self.relay.discard(self.tensor(batch))

    def teardown(self):
        if self.debug:
            self.relay.check()
        self.relay.close()
        self.in_flight.clear()
        self.hw.synchronize()
        self.exits.close()


class WatchedRelay(Relay):
    """The same, debugging; and what it must find."""

    debug = True

    @stateful.rule(row=st.integers(1, ROWS - 1), stream=streams)
    def misuse(self, row, stream):
        with self.on(stream):
            if row in self.full:
                self.relay.stash(self.tensor([row]), payload(SPEC, [0], self.relay.device))
                self.full[row] = 0
                kind = "written twice"
            else:
                self.relay.resolve(self.tensor([row]))
                kind = "read "
            with pytest.raises(ConsumeOnceError, match=f"row {row} .* was {kind}"):
                self.relay.check()


SETTINGS = hypothesis.settings(
    max_examples=25, stateful_step_count=30, deadline=None, database=None, derandomize=True
)


@pytest.mark.parametrize("machine", [Relay, WatchedRelay], ids=["plain", "debug"])
@pytest.mark.usefixtures("hw", "in_any_order")
def test_a_map_is_a_dict_of_rows(machine):
    stateful.run_state_machine_as_test(machine, settings=SETTINGS)
