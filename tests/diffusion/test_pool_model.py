"""Whatever is done in whatever order, a pool is a list of leases with contents of their own.

Two streams take turns at will; leases are freed while views of them live, while peers may write
them and while copies are on their way.
"""

import ctypes
import gc

import hypothesis
import pytest
import torch
from hypothesis import stateful
from hypothesis import strategies as st

import hwcore
from hwcore.diffusion import TransferTensorBuffer, manifest_of
from hwcore.errors import AllocationTimeoutError, ArgumentValueError, LeaseError

SIZE = 1 << 15
sizes = st.one_of(st.integers(0, 300), st.integers(3000, SIZE // 2))
streams = st.sampled_from([None, 0, 1])
devices = st.sampled_from(["host", "device"])


class Pool(stateful.RuleBasedStateMachine):
    """A pool, and for each lease what it holds and who keeps it."""

    def __init__(self):
        super().__init__()
        self.hw = hwcore.current_backend()
        memory = torch.zeros(SIZE, dtype=torch.uint8)
        memory = memory.to(self.hw.device()) if self.on_device else self.hw.pin_memory(memory)
        self.pool = TransferTensorBuffer(memory, self.hw)
        self.streams = [self.hw.create_stream(), self.hw.create_stream()]
        self.numbers = 0
        self.live = {}  # lease: (manifest, number) or None
        self.freed = []  # bytes of names
        self.held = {}  # lease: holders
        self.views = []  # (lease, view, number)
        self.copies = []  # (event, copy, number)

    leases = stateful.Bundle("leases")

    def number(self):
        self.numbers = self.numbers % 250 + 1
        return self.numbers

    def stream(self, which):
        return None if which is None else self.streams[which]

    def at(self, where):
        return torch.device("cpu") if where == "host" else self.hw.device()

    def taken(self):
        """Ranges that must not be given out: live, viewed or held."""
        kept = {*self.live, *(lease for lease, holders in self.held.items() if holders)}
        kept |= {lease for lease, *_ in self.views}
        return [(one.offset, one.offset + one.size_bytes) for one in kept if one.size_bytes]

    @stateful.rule(target=leases, size=sizes)
    def allocate(self, size):
        taken, leaving = self.taken(), self.pool.stats().freed_leases
        try:
            lease = self.pool.allocate(size, timeout_s=0)
        except AllocationTimeoutError:
            self.hw.synchronize()  # now nothing but what the model knows is in the way
            if not self.fits(size):
                return stateful.multiple()
            assert leaving, "there was room at once"
            lease = self.pool.allocate(size, timeout_s=0)
        end = lease.offset + lease.size_bytes
        assert all(end <= a or b <= lease.offset for a, b in taken if size)
        assert bytes(lease) not in self.freed
        if size:
            memory = lease.memory  # a peer that knows no stream
            ctypes.memset(memory.data_ptr(), 255, size)
            self.live[lease] = None
        else:
            self.live[lease] = None
        return lease

    def fits(self, size):
        """Whether best fit has room, by the pool's own figures and the model's."""
        free, end = [], 0
        for start, stop in sorted((a, -(-b // 64) * 64) for a, b in self.taken()):
            free.append(start - end)
            end = stop
        stats = self.pool.stats().ranges
        assert stats.free_bytes == sum(free) + SIZE - end
        return max([*free, SIZE - end]) >= -(-size // 64) * 64

    @stateful.rule(lease=leases, where=devices, which=streams)
    def write(self, lease, where, which):
        number = self.number()
        tree = self.tree(lease.size_bytes, number, self.at(where))
        if lease not in self.live:
            with pytest.raises(LeaseError):
                self.pool.write_tensors_from_device(lease, tree, self.stream(which))
        elif not any(one is lease for one, *_ in self.views):
            manifest, _ = self.pool.write_tensors_from_device(lease, tree, self.stream(which))
            self.live[lease] = manifest, number

    def tree(self, size, number, device):
        """A large and two small tensors that fill a lease to some bytes."""
        small = torch.full((size // 10,), number, dtype=torch.uint8, device=device)
        large = torch.full((size * 7 // 10,), number, dtype=torch.uint8, device=device)
        tree = {"a": [small, large], "b": small + 0}
        return tree if manifest_of(tree)[0].size_bytes <= size else {"a": [small], "b": small}

    @stateful.rule(lease=leases)
    def write_too_much(self, lease):
        if lease in self.live:
            more = torch.zeros(lease.size_bytes + 1, dtype=torch.uint8)
            with pytest.raises(ArgumentValueError):
                self.pool.write_tensors_from_device(lease, [more])

    @stateful.rule(lease=leases)
    def view(self, lease):
        if self.live.get(lease):
            manifest, number = self.live[lease]
            tree, event = self.pool.read_tensors_from_manifest(lease, manifest)
            self.hw.synchronize_event(event)
            self.views.append((lease, tree["b"], number))
            if not tree["b"].numel():
                self.views.pop()

    @stateful.rule(lease=leases, where=devices, which=streams)
    def read(self, lease, where, which):
        if self.live.get(lease):
            manifest, number = self.live[lease]
            tree, event = self.pool.read_tensors_from_manifest(
                lease, manifest, self.at(where), self.stream(which)
            )
            for part in (*tree["a"], tree["b"]):
                self.copies.append((event, part, number))

    @stateful.precondition(lambda self: self.copies)
    @stateful.rule()
    def look(self):
        """All that was copied is what was written, whatever became of the leases."""
        for event, copy, number in self.copies:
            self.hw.synchronize_event(event)
            assert copy.eq(number).all().item()
        self.copies.clear()

    @stateful.precondition(lambda self: self.views)
    @stateful.rule()
    def drop_views(self):
        for _, view, number in self.views:
            assert view.eq(number).all().item()
            del view
        self.views.clear()
        gc.collect(0)

    @stateful.rule(lease=leases, holder=st.sampled_from("AB"))
    def quarantine(self, lease, holder):
        if lease in self.live:
            self.pool.quarantine(lease, holder)
            self.held.setdefault(lease, set()).add(holder)

    @stateful.rule(lease=leases, holder=st.sampled_from("AB"))
    def release(self, lease, holder):
        if holder in self.held.get(lease, ()):
            self.pool.release(bytes(lease), holder)
            self.held[lease].discard(holder)
        else:
            with pytest.raises(LeaseError):
                self.pool.release(bytes(lease), holder)

    @stateful.rule(holder=st.sampled_from("AB"))
    def peer_dies(self, holder):
        wanted = sum(holder in holders for holders in self.held.values())
        assert self.pool.release_all(holder) == wanted
        for holders in self.held.values():
            holders.discard(holder)

    @stateful.rule(lease=leases)
    def free(self, lease):
        if lease in self.live:
            assert self.pool.lease(bytes(lease)) is lease
            self.pool.free(lease)
            del self.live[lease]
            self.freed.append(bytes(lease))
        else:
            with pytest.raises(LeaseError):
                self.pool.free(lease)
            with pytest.raises(LeaseError):
                self.pool.lease(bytes(lease))

    @stateful.invariant()
    def those_that_are_not_freed_are_listed(self):
        assert set(self.pool.leases()) == set(self.live)

    def teardown(self):
        self.look()
        if self.views:
            self.drop_views()
        for lease in list(self.live):
            self.pool.free(lease)
        for holder in "AB":
            self.pool.release_all(holder)
        self.pool.close()
        assert self.pool.stats().ranges.free_bytes == SIZE


class OnDevice(Pool):
    on_device = True


class OnHost(Pool):
    on_device = False


SETTINGS = hypothesis.settings(
    max_examples=40, stateful_step_count=40, deadline=None, database=None, derandomize=True
)


@pytest.mark.parametrize("machine", [OnHost, OnDevice], ids=["host", "device"])
@pytest.mark.usefixtures("hw", "in_any_order")
def test_a_pool_is_a_list_of_leases_with_contents_of_their_own(machine):
    stateful.run_state_machine_as_test(machine, settings=SETTINGS)
