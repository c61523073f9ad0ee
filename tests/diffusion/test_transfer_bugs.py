"""What SGLang 0.5.23 gets wrong in its transfer manager, by the numbers of the list (see
test_upstream_bugs for those of layout, codec, allocator and pool).

Everywhere the caller gets a named error, at staging where that can be, or the right tensors;
nothing is lost, and the next request is served.
"""

import pytest
import torch

from hwcore.diffusion.messages import Slot
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    HwcoreError,
    LeaseError,
    PeerError,
)

from ._tensors import bits, filled, same

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _of_the_host_alone(once):
    """Streams are in test_transfer_streams, other processes in test_transfer_processes."""


def serve(sender, receiver, tree):
    """Bring a tree over, by both ways, and look that nothing is left."""
    for way in ("send", "push"):
        slot = receiver.grant(sender.size_of(tree))
        if way == "send":
            seal = sender.send_tensors("next", tree, receiver.address, slot)
        else:
            staged = sender.stage_tensors("next", tree, timeout_s=1)
            seal = sender.push_to_peer(staged, receiver.address, slot, 5)
            staged.free()
        assert receiver.consume(slot)
        got = receiver.load_tensors(slot, seal)
        for one, other in zip(got, tree, strict=True):
            same(one, other)
        del got, one
        receiver.finish(slot)
    for manager in (sender, receiver):
        stats = manager.stats()
        assert stats.pool.live_leases == stats.pool.freed_leases == stats.staged == 0


@pytest.fixture(autouse=True)
def goes_on(pair):
    """After each failure the next request is served, from empty pools."""
    yield
    serve(*pair, [torch.ones(3), torch.arange(9000)])


# --- 1: a failed push that is reported as a success -----------------------------------------------


def test_01_a_push_that_failed_has_no_seal_and_what_is_in_the_slot_is_not_loaded(pair, monkeypatch):
    from hwcore.diffusion.engines.peer import HostPeer

    sender, receiver = pair
    earlier = receiver.grant(12)
    seal = sender.send_tensors("earlier", torch.full((3,), 1.0), receiver.address, earlier)
    staged = sender.stage_tensors("r", torch.full((3,), 81.0))

    def half(self, source, offset, timeout_s):
        raise PeerError("gone")  # noqa: EM101

    with monkeypatch.context() as patch:
        patch.setattr(HostPeer, "write", half)
        with pytest.raises(PeerError):
            sender.push_to_peer(staged, receiver.address, earlier, 5)
    # Still staged: the second try is a success, and the seal of before is worth nothing.
    sender.push_to_peer(staged, receiver.address, earlier, 5)
    staged.free()
    assert receiver.consume(earlier)
    with pytest.raises(PeerError, match="checksum"):
        receiver.load_tensors(earlier, seal)
    receiver.finish(earlier)


# --- 5: sizes that leave padding out --------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [[8, MIB // 4 - 8], [64] * 4000, [8, 100_000 - 8, 100_000 - 3]], ids=str
)
def test_05_a_slot_of_the_size_that_is_said_is_large_enough(pair, sizes):
    serve(*pair, [torch.full((size,), n % 251, dtype=torch.uint8) for n, size in enumerate(sizes)])


# --- 6: an exception while staging or loading -----------------------------------------------------

UNFIT = {
    "sparse": lambda: torch.zeros(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "no tensor": lambda: {1, 2},
    "of another class": lambda: torch.nn.Buffer(torch.zeros(3)).as_subclass(Odd),
}


class Odd(torch.Tensor):
    pass


@pytest.mark.parametrize("name", UNFIT)
def test_06_what_cannot_be_sent_is_an_error_at_staging_that_leaks_nothing(pair, name):
    sender, receiver = pair
    slot = receiver.grant(4096)
    tree = [torch.zeros(3), UNFIT[name]()]
    for _ in range(50):
        for use in (
            lambda: sender.stage_tensors("r", tree),
            lambda: sender.stage_tensors_async("r", tree),
            lambda: sender.send_tensors("r", tree, receiver.address, slot),
            lambda: sender.size_of(tree),
        ):
            with pytest.raises(ArgumentTypeError, match=r"tree|tensor 1"):
                use()
    assert sender.stats().pool.live_leases == 0
    receiver.free(slot)


def test_06_an_error_in_the_middle_of_staging_leaks_nothing(pair, monkeypatch):
    from hwcore.diffusion import copying, ways
    from hwcore.diffusion.gathering import Gathering

    sender, receiver = pair
    kept = []

    def failing(*arguments):
        raise MemoryError

    slot = receiver.grant(MIB // 2)
    with monkeypatch.context() as patch:
        patch.setattr(copying, "write_layout", failing)
        patch.setattr(ways, "write_part_summed", failing)
        patch.setattr(Gathering, "gather", failing)
        for _ in range(5):
            with pytest.raises(MemoryError) as caught:
                sender.send_tensors("r", torch.ones(MIB // 8), receiver.address, slot)
            kept.append(caught.value)  # as a log may: its traceback holds no memory of the pool
            with pytest.raises(MemoryError):
                sender.stage_tensors("r", torch.ones(MIB // 8), timeout_s=1)
    assert sender.stats().pool.live_leases == 0
    receiver.free(slot)


def test_06_what_cannot_be_loaded_leaks_nothing_even_while_the_error_is_kept(pair):
    sender, receiver = pair
    errors = []
    for _ in range(3):
        slot = receiver.grant(receiver.size_bytes)
        seal = sender.send_tensors("r", torch.ones(3), receiver.address, slot)
        receiver.consume(slot)
        receiver._engine.memory[slot.offset] ^= 1
        with pytest.raises(PeerError) as caught:
            receiver.load_tensors(slot, seal)
        errors.append(caught.value)
        receiver.finish(slot)
        assert receiver.stats().pool.freed_leases == 0
    assert len(errors) == 3


# --- 7: slots that shrink -------------------------------------------------------------------------


def test_07_a_slot_that_held_little_does_not_make_the_next_one_small(pair):
    sender, receiver = pair
    for _ in range(3):
        slots = [receiver.grant(receiver.size_bytes // 2) for _ in range(2)]
        for slot in slots:
            seal = sender.send_tensors("r", torch.ones(3), receiver.address, slot)
            receiver.consume(slot)
            assert receiver.load_tensors(slot, seal).sum() == 3
            receiver.finish(slot)


# --- 8: what failed or timed out and is never freed -----------------------------------------------


def test_08_a_request_that_is_given_up_frees_what_was_staged_and_granted(pair):
    sender, receiver = pair
    for _ in range(20):  # the pool would be full
        sender.stage_tensors("r", torch.ones(MIB // 16), timeout_s=1)
        slot = receiver.grant(MIB // 4)
        sender.abort("r")
        receiver.free(slot)


def test_08_a_push_that_fails_loses_neither_the_staged_tree_nor_the_slot(pair):
    sender, _ = pair
    for _ in range(20):
        staged = sender.stage_tensors("r", torch.ones(MIB // 16), timeout_s=1)
        with pytest.raises(HwcoreError):
            sender.push_to_peer(staged, "tcp:127.0.0.1:1", Slot(1, 0, MIB // 2), 5)
        staged.free()


# --- 9: a pool that can never hold a request ------------------------------------------------------


def test_09_a_tree_larger_than_the_pool_is_refused_at_staging_with_both_sizes(pair):
    sender, _ = pair
    with pytest.raises(ArgumentValueError, match=rf"{2 * MIB} .*at most {sender.size_bytes}"):
        sender.stage_tensors("r", torch.zeros(2 * MIB, dtype=torch.uint8))


# --- 11: names that say zero copies ---------------------------------------------------------------


def test_11_float8_arrives_and_loading_copies_nothing(pair):
    sender, receiver = pair
    sent = filled(torch.float8_e4m3fn, (100, 100))
    slot = receiver.grant(sender.size_of(sent))
    seal = sender.send_tensors("r", sent, receiver.address, slot)
    receiver.consume(slot)
    got = receiver.load_tensors(slot, seal)
    assert got.data_ptr() == receiver._engine.memory.data_ptr() + slot.offset
    same(got, sent)
    receiver.finish(slot)
    del got


@pytest.mark.parametrize("kind", ["shm"], indirect=True)
def test_11_a_peer_that_is_mapped_gets_the_only_copy(pair):
    sender, receiver = pair
    full = sender.pool.allocate(sender.size_bytes)
    slot = receiver.grant(64)
    sender.send_tensors("r", torch.ones(3), receiver.address, slot)
    receiver.free(slot)
    sender.pool.free(full)


# --- 12: the result aliases the slot --------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")], ids=repr)
def test_12_a_result_on_a_device_that_is_named_is_never_the_slot(pair, device):
    sender, receiver = pair
    slot = receiver.grant(12)
    seal = sender.send_tensors("r", torch.full((3,), 7.0), receiver.address, slot)
    receiver.consume(slot)
    got = receiver.load_tensors(slot, seal, device)
    receiver.finish(slot)
    following = receiver.grant(12)
    assert following.offset == slot.offset
    sender.send_tensors("r", torch.full((3,), 8.0), receiver.address, following)
    assert got.tolist() == [7, 7, 7]
    receiver.free(following)


# --- 13: slots in flight --------------------------------------------------------------------------


def test_13_a_request_may_have_several_staged_trees_and_none_is_orphaned(pair):
    sender, _ = pair
    sender.stage_tensors("same", torch.ones(3))
    sender.stage_tensors("same", torch.ones(3))
    assert sender.stats().staged == 2
    assert sender.abort("same")
    assert sender.stats().staged == 0


def test_13_a_tree_that_is_freed_during_its_push_arrives_as_it_was(pair, monkeypatch):
    from hwcore.diffusion.engines.peer import HostPeer

    sender, receiver = pair
    slot = receiver.grant(12)
    staged = sender.stage_tensors("r", torch.full((3,), 1.0))
    write = HostPeer.write

    def freeing(*arguments):
        staged.free()
        for _ in range(3):  # would get its memory
            sender.stage_tensors("other", torch.full((3,), 666.0))
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(HostPeer, "write", freeing)
        seal = sender.push_to_peer(staged, receiver.address, slot, 5)
    sender.abort("other")
    receiver.consume(slot)
    assert receiver.load_tensors(slot, seal).tolist() == [1, 1, 1]
    receiver.finish(slot)


def test_13_what_is_freed_is_neither_pushed_nor_freed_again(pair):
    sender, receiver = pair
    slot = receiver.grant(12)
    staged = sender.stage_tensors("r", torch.ones(3))
    staged.free()
    other = sender.stage_tensors("other", torch.ones(3))  # has its memory
    staged.free()
    assert sender.stats().staged == 1
    with pytest.raises(LeaseError):
        sender.push_to_peer(staged, receiver.address, slot, 5)
    other.free()
    receiver.free(slot)


def test_13_a_stale_slot_is_neither_consumed_nor_freed_for_its_next_tenant(pair):
    _, receiver = pair
    stale = receiver.grant(64)
    receiver.free(stale)
    following = receiver.grant(64)
    assert following.offset == stale.offset
    assert not receiver.consume(stale)
    receiver.free(stale)
    assert receiver.granted() == [following]
    receiver.free(following)


def test_13_more_than_the_slot_is_not_pushed_and_the_neighbour_keeps_its_bytes(pair):
    sender, receiver = pair
    slot, neighbour = receiver.grant(64), receiver.grant(64)
    memory = receiver._engine.memory
    memory[neighbour.offset : neighbour.offset + 64] = 5
    with pytest.raises(ArgumentValueError, match="at most 64"):
        sender.send_tensors("r", torch.ones(17), receiver.address, slot)
    assert bits(memory[neighbour.offset : neighbour.offset + 64]) == [5] * 64
    receiver.free(slot)
    receiver.free(neighbour)


# --- 14: bytes of the request before --------------------------------------------------------------


@pytest.mark.parametrize("way", ["send", "push"])
def test_14_only_what_is_used_is_pushed_and_nothing_of_the_tenant_before(pair, way):
    sender, receiver = pair
    sender._engine.memory.fill_(0xEE)
    theirs = receiver._engine.memory.fill_(0xAA)
    sent = [filled(torch.uint8, (n,), seed=n) for n in (5001, 20_003, 4999, 3)]
    useful = sum(tensor.nbytes for tensor in sent)
    size = sender.size_of(sent)
    assert size <= 1.02 * useful
    slot = receiver.grant(1 << 16)  # more than that
    if way == "send":
        seal = sender.send_tensors("r", sent, receiver.address, slot)
    else:
        staged = sender.stage_tensors("r", sent)
        seal = sender.push_to_peer(staged, receiver.address, slot, 5)
        staged.free()
    assert size + len(seal) <= 1.02 * useful
    there = theirs[slot.offset : slot.offset + slot.size_bytes]
    assert bits(there[size:]) == [0xAA] * (slot.size_bytes - size)
    from hwcore.diffusion import layout_of

    for start, end in layout_of(sent).gaps():
        assert not there[start:end].any()
    receiver.free(slot)


def test_14_a_thousand_small_tensors_take_hardly_more_than_their_bytes(pair):
    sender, receiver = pair
    sent = [filled(torch.uint8, (64,), seed=n) for n in range(1000)]
    slot = receiver.grant(sender.size_of(sent))
    seal = sender.send_tensors("r", sent, receiver.address, slot)
    assert sender.size_of(sent) + len(seal) <= 1.02 * 64_000
    receiver.free(slot)
