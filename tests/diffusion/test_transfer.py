"""A tree goes from one manager to another and is the same there; what cannot be says why."""

import threading
import time

import pytest
import torch

from hwcore.diffusion import DiffusionTransferManager, EnumRegistry, RoleType, ways
from hwcore.diffusion.messages import Slot
from hwcore.diffusion.seal import seal as sealed
from hwcore.errors import (
    AllocationCancelledError,
    AllocationTimeoutError,
    ArgumentTypeError,
    ArgumentValueError,
    ClosedError,
    HwcoreError,
    LeaseError,
    PeerError,
    TransferAbortedError,
)

from ._tensors import filled, same, shapes


@pytest.fixture(autouse=True)
def _of_the_host_alone(once):
    """Here no device is part of it; see test_transfer_streams."""


def send(sender, receiver, tree, how="send", request_id="a request"):
    """Bring a tree into a slot that a job has; return slot and seal."""
    slot = receiver.grant(sender.size_of(tree))
    seal = push(sender, tree, receiver.address, slot, how, request_id)
    assert receiver.consume(slot)
    return slot, seal


def push(sender, tree, address, slot, how, request_id="r"):
    if how == "send":
        return sender.send_tensors(request_id, tree, address, slot, timeout_s=10)
    staged = sender.stage_tensors(request_id, tree)
    seal = sender.push_to_peer(staged, address, slot, 10)
    staged.free()
    return seal


@pytest.fixture(params=["send", "push"])
def how(request):
    """Stage and push in one call, or in two."""
    return request.param


# --- What arrives ---------------------------------------------------------------------------------

F32, F64, C128 = torch.float32, torch.float64, torch.complex128
TREES = {
    "large and small": lambda: {"a": filled(F32, (300, 101)), "b": [filled(torch.int64, ()), None]},
    "no tensor": lambda: {"text": "x", "number": 3},
    "empty tensor": lambda: [torch.empty(0, 3)],
    "transposed slice": lambda: filled(torch.bfloat16, (200, 300)).t()[::3],
    "expanded": lambda: filled(torch.float32, (1, 500)).expand(70, 500),
    "channels last": lambda: filled(F32, (2, 3, 40, 50)).to(memory_format=torch.channels_last),
    "lazily conjugated": lambda: filled(torch.complex64, (90, 91)).conj(),
    "conjugated in its own order": lambda: filled(torch.complex128, (90, 31)).t().conj(),
    "bytes at odd places": lambda: [filled(torch.uint8, (n,)) for n in (5001, 40003, 7, 16387)],
    "bytes before words": lambda: [filled(torch.uint8, (16385,)), filled(C128, (2000,))],
    "rows before words": lambda: [filled(F64, (2, 3002))[:, ::2], filled(C128, (256,)).conj()],
    "one long row": lambda: filled(torch.uint8, (1, 1, 100_001))[:, :, 1:],
    "wide rows of a view": lambda: filled(torch.float64, (3, 9000))[:, ::2],
    "many small": lambda: [filled(torch.uint8, (64,), seed=n) for n in range(1000)],
    "the same twice": lambda: [t := filled(torch.float32, (9000,)), t],
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_a_tree_arrives_as_it_is_by_every_way(pair, how, name):
    sender, receiver = pair
    sent = TREES[name]()
    slot, seal = send(sender, receiver, sent, how)
    got = receiver.load_tensors(slot, seal)
    receiver.finish(slot)
    assert_same(got, sent)


def assert_same(got, sent):
    if isinstance(sent, torch.Tensor):
        same(got, sent)
    elif isinstance(sent, dict):
        assert got.keys() == sent.keys()
        for key, value in sent.items():
            assert_same(got[key], value)
    elif isinstance(sent, list):
        assert len(got) == len(sent)
        for one, other in zip(got, sent, strict=True):
            assert_same(one, other)
    else:
        assert got == sent


def test_enums_arrive_where_both_sides_know_them(manager):
    enums = EnumRegistry()
    enums.register(RoleType)
    sender, receiver = manager(enums=enums), manager(enums=enums)
    slot, seal = send(sender, receiver, [RoleType.DENOISER, torch.ones(3)])
    assert receiver.load_tensors(slot, seal)[0] is RoleType.DENOISER
    receiver.finish(slot)


def test_a_tree_of_which_the_pool_holds_only_chunks_is_sent(manager, kind):
    sender, receiver = manager(1 << 16, chunk_bytes=1 << 14), manager()
    if kind == "shm":
        sender.pool.allocate(sender.size_bytes)  # straight to the peer: it needs no room at all
    sent = filled(torch.float32, (100_000,))
    slot, seal = send(sender, receiver, sent)
    same(receiver.load_tensors(slot, seal), sent)
    receiver.finish(slot)
    for lease in sender.pool.leases():
        sender.pool.free(lease)


def test_who_wants_to_know_is_told_of_each_part(pair, kind):
    sender, receiver = pair
    told = []
    sent = filled(torch.uint8, (3 << 14,))
    slot = receiver.grant(sender.size_of(sent))
    sender.send_tensors("r", sent, receiver.address, slot, on_part=lambda *part: told.append(part))
    kinds = [part for part, _, _ in told]
    assert kinds.count("stage") == (1 if kind == "shm" else 3)
    assert kinds.count("push") == (0 if kind == "shm" else 3)
    assert all(started <= ended for _, started, ended in told)
    receiver.free(slot)


@pytest.mark.parametrize("kind", ["tcp"], indirect=True)
def test_parts_are_pushed_while_others_are_staged(pair, monkeypatch):
    def slowed(call):
        def slow(*arguments):
            time.sleep(0.1)
            call(*arguments)

        return slow

    for name in ("write", "write_part_summed"):
        monkeypatch.setattr(ways, name, slowed(getattr(ways, name)))
    sender, receiver = pair
    told = {"stage": [], "push": []}
    sent = filled(torch.uint8, (4 << 14,))
    slot = receiver.grant(sender.size_of(sent))
    sender.send_tensors(
        "r", sent, receiver.address, slot, on_part=lambda kind, *span: told[kind].append(span)
    )
    for (push_started, push_ended), (started, ended) in zip(
        told["push"][:-1], told["stage"][1:], strict=True
    ):
        assert started < push_ended
        assert push_started < ended
    receiver.free(slot)


def test_an_observer_that_cannot_be_called_is_refused_before_anything_is_sent(pair):
    sender, receiver = pair
    slot = receiver.grant(64)
    with pytest.raises(ArgumentTypeError, match=r"on_part got 3 \(int\); expected a callable"):
        sender.send_tensors("r", torch.ones(3), receiver.address, slot, on_part=3)
    assert sender.stats().pushed_bytes == 0
    receiver.free(slot)


# --- Small tensors, which are gathered ------------------------------------------------------------


def test_small_tensors_in_every_way_that_they_can_lie_arrive(pair, how):
    sender, receiver = pair
    tensors = [tensor for tensor in shapes("cpu").values() if tensor.nbytes < 4096]
    tensors += [filled(C128, (5,)).conj(), torch._neg_view(filled(F32, (7,)))]
    for tree in (tensors, *([tensor] for tensor in tensors)):
        slot, seal = send(sender, receiver, tree, how)
        got = receiver.load_tensors(slot, seal)
        for one, wanted in zip(got, tree, strict=True):
            same(one, wanted)
        receiver.finish(slot)


def test_small_tensors_arrive_beside_one_without_elements(pair, how):
    sender, receiver = pair
    elsewhere = torch.ones(9)
    slot, seal = send(sender, receiver, [elsewhere[:0], torch.arange(4.0)], how)
    empty, got = receiver.load_tensors(slot, seal)
    same(empty, elsewhere[:0])
    same(got, torch.arange(4.0))
    del empty, got
    receiver.finish(slot)


def test_trees_that_are_alike_keep_their_own_values(pair, how):
    sender, receiver = pair
    for value in (1, True, 1.0, "1", 2):
        tensor = torch.full((3,), float(value))
        slot, seal = send(sender, receiver, [value, tensor, tensor, torch.ones(3)], how)
        got, first, again, other = receiver.load_tensors(slot, seal)
        assert (got, type(got)) == (value, type(value))
        same(first, tensor)
        assert again is first
        same(other, torch.ones(3))
        del first, again, other
        receiver.finish(slot)


def test_a_tensor_that_is_given_twice_is_not_taken_for_two_that_are_alike(pair, how):
    sender, receiver = pair
    one, other = torch.zeros(3), torch.ones(3)
    for tree in ([one, one, other], [one, other, one], [one, other, other], [other, one, other]):
        slot, seal = send(sender, receiver, tree, how)
        got = receiver.load_tensors(slot, seal)
        assert [int(tensor[0]) for tensor in got] == [int(tensor[0]) for tensor in tree]
        del got
        receiver.finish(slot)


def test_chunks_larger_than_the_pool_are_made_to_fit(manager):
    sender, receiver = manager(1 << 16, chunk_bytes=1 << 30), manager()
    sent = filled(torch.uint8, (60_000,))
    slot, seal = send(sender, receiver, sent)
    same(receiver.load_tensors(slot, seal), sent)
    receiver.finish(slot)


@pytest.mark.parametrize("kind", ["tcp"], indirect=True)
def test_the_next_chunk_is_staged_while_one_is_pushed(pair, monkeypatch):
    sender, receiver = pair
    from hwcore.diffusion import ways

    order, staged = [], threading.Semaphore(0)
    write, stage = ways.write, ways.write_part_summed

    def slow_write(*arguments):
        order.append("push")
        assert staged.acquire(timeout=5)  # of the next, or it would never come
        write(*arguments)

    def told_stage(*arguments):
        stage(*arguments)
        order.append("stage")
        if order.count("stage") > 1:
            staged.release()
        if order.count("stage") == 3:  # there is none after the last
            staged.release()

    monkeypatch.setattr(ways, "write", slow_write)
    monkeypatch.setattr(ways, "write_part_summed", told_stage)
    sent = filled(torch.uint8, (3 << 14,))
    slot = receiver.grant(sender.size_of(sent))
    seal = sender.send_tensors("r", sent, receiver.address, slot)
    assert order.count("stage") == order.count("push") == 3
    assert receiver.consume(slot)
    same(receiver.load_tensors(slot, seal), sent)
    receiver.finish(slot)


# --- Views ----------------------------------------------------------------------------------------


def test_what_is_loaded_is_a_view_of_the_slot_and_its_clone_is_not(pair):
    sender, receiver = pair
    slot, seal = send(sender, receiver, torch.ones(5000))
    view, clone = receiver.load_tensors(slot, seal), receiver.load_tensors(slot, seal, clone=True)
    start = receiver._engine.memory.data_ptr() + slot.offset
    assert view.data_ptr() == start
    assert clone.data_ptr() != start
    receiver.finish(slot)
    del view


def test_a_view_that_outlives_its_slot_keeps_the_memory_from_others(pair):
    sender, receiver = pair
    whole = torch.ones(receiver.size_bytes // 4)
    slot, seal = send(sender, receiver, whole)
    view = receiver.load_tensors(slot, seal)
    receiver.finish(slot)
    assert receiver.grant(64) is None
    assert view.sum() == whole.numel()
    del view
    again = receiver.grant(64)
    assert again is not None
    receiver.free(again)


def test_a_tensor_on_a_named_device_is_no_view(pair):
    sender, receiver = pair
    slot, seal = send(sender, receiver, torch.ones(5000))
    got = receiver.load_tensors(slot, seal, "cpu")
    receiver.finish(slot)
    other = receiver.grant(receiver.size_bytes)
    assert other is not None
    receiver.pool.lease(other.lease.to_bytes(8, "little")).memory.zero_()
    assert got.sum() == 5000
    receiver.free(other)


# --- Slots ----------------------------------------------------------------------------------------


def test_a_slot_is_granted_then_consumed_then_finished(pair):
    _, receiver = pair
    slot = receiver.grant(1000)
    assert receiver.granted() == [slot]
    assert receiver.consume(slot)
    assert not receiver.consume(slot)
    assert receiver.granted() == []
    receiver.finish(slot)
    with pytest.raises(LeaseError, match="consumed, and not finished"):
        receiver.finish(slot)


def test_a_slots_name_is_a_number_that_messages_hold_and_never_comes_twice(pair):
    _, receiver = pair
    names = set()
    for _ in range(200):
        slot = receiver.grant(64)
        assert 0 <= slot.lease < 2**63
        names.add(slot.lease)
        receiver.free(slot)
    assert len(names) == 200


def test_there_is_no_slot_where_there_is_no_room_and_nobody_waits(pair):
    _, receiver = pair
    slot = receiver.grant(receiver.size_bytes)
    started = time.monotonic()
    assert receiver.grant(1) is None
    assert time.monotonic() - started < 1
    receiver.free(slot)
    with pytest.raises(ArgumentValueError, match="all that the pool has"):
        receiver.grant(receiver.size_bytes + 1)


def test_a_slot_is_not_taken_from_under_those_who_wait_for_room(pair):
    _, receiver = pair
    slot = receiver.grant(receiver.size_bytes - 128)
    waiting = threading.Thread(target=receiver.stage_tensors, args=("r", torch.zeros(5000)))
    waiting.start()
    while receiver.pool.stats().waiting_requests != 1:
        time.sleep(0.001)
    assert receiver.grant(64) is None
    receiver.free(slot)
    waiting.join(10)
    assert receiver.abort("r")


def test_freeing_what_is_consumed_or_unknown_does_nothing(pair):
    _, receiver = pair
    slot, other = receiver.grant(1000), receiver.grant(1000)
    receiver.consume(slot)
    receiver.free(slot)
    receiver.free(other)
    receiver.free(other)
    receiver.free(Slot(12345, 0, 64))
    assert receiver.stats().consumed == 1
    receiver.finish(slot)


@pytest.mark.parametrize("change", [(0, 0, 1), (0, 0, -1), (0, 64, 0), (1, 0, 0)])
def test_a_slot_that_names_another_range_than_its_lease_has_is_refused(pair, change):
    _, receiver = pair
    slot, neighbour = receiver.grant(1000), receiver.grant(1000)
    fields = (slot.lease, slot.offset, slot.size_bytes)
    forged = Slot(*(a + b for a, b in zip(fields, change, strict=True)))
    assert not receiver.consume(forged)
    receiver.free(forged)
    assert receiver.granted() == [slot, neighbour]
    receiver.consume(slot)
    with pytest.raises(LeaseError):
        receiver.load_tensors(forged, b"")
    receiver.finish(slot)
    receiver.free(neighbour)


def test_a_slot_that_no_job_has_is_not_loaded(pair):
    sender, receiver = pair
    slot = receiver.grant(64)
    seal = sender.send_tensors("r", torch.ones(3), receiver.address, slot)
    with pytest.raises(LeaseError, match="consume"):
        receiver.load_tensors(slot, seal)
    receiver.free(slot)


# --- Seals ----------------------------------------------------------------------------------------


def test_bytes_that_changed_on_the_way_are_not_loaded(pair, how):
    sender, receiver = pair
    slot, seal = send(sender, receiver, torch.ones(5000), how)
    receiver._engine.memory[slot.offset + 12345] ^= 1
    with pytest.raises(PeerError, match=f"Slot.*lease={slot.lease}.*checksum"):
        receiver.load_tensors(slot, seal)
    receiver.finish(slot)


def test_a_side_that_checks_wants_a_checksum(manager):
    sender, receiver = manager(checksum=False), manager()
    slot, seal = send(sender, receiver, torch.ones(3))
    with pytest.raises(PeerError, match="checksum=True"):
        receiver.load_tensors(slot, seal)
    receiver.finish(slot)


def test_without_checksums_nothing_is_summed(manager):
    sender, receiver = manager(checksum=False), manager(checksum=False)
    slot, seal = send(sender, receiver, torch.ones(5000))
    receiver._engine.memory[slot.offset + 3] = 0
    assert receiver.load_tensors(slot, seal)[0] != 1
    receiver.finish(slot)


@pytest.mark.parametrize("size", [1, 64, 5000, 40_000])
def test_the_seal_of_both_ways_is_the_same(pair, size):
    sender, receiver = pair
    tree = [filled(torch.uint8, (size,)), torch.ones(3)]
    slots = []
    seals = set()
    for way in ("send", "push"):
        slot, seal = send(sender, receiver, tree, way)
        seals.add(seal)
        slots.append(slot)
    assert len(seals) == 1
    for slot in slots:
        receiver.finish(slot)


HOSTILE = {
    "nothing": b"",
    "garbage": b"\xff" * 100,
    "another type": [1, 2],
    "another version": b"\x94\x02\x00\xc0\xc4\x00",
    "no manifest": sealed(b"", 0, None),
    "too long": bytes(17 << 20),
    "deep": b"\x91" * 5000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_seal_that_is_none_is_refused_and_the_slot_goes_on(pair, name):
    sender, receiver = pair
    slot, seal = send(sender, receiver, torch.ones(3))
    with pytest.raises(HwcoreError):
        receiver.load_tensors(slot, HOSTILE[name])
    assert receiver.load_tensors(slot, seal).sum() == 3
    receiver.finish(slot)


def test_a_seal_cut_short_or_changed_anywhere_never_reads_beyond_the_slot(pair):
    sender, receiver = pair
    slot, seal = send(sender, receiver, {"a": torch.ones(20), "b": torch.zeros(3)})
    memory = receiver._engine.memory
    for at in range(len(seal)):
        for changed in (seal[:at], seal[:at] + bytes([seal[at] ^ 0x15]) + seal[at + 1 :]):
            try:
                got = receiver.load_tensors(slot, changed)
            except HwcoreError:
                continue
            for tensor in got.values():
                start = tensor.untyped_storage().data_ptr() - memory.data_ptr()
                assert start == slot.offset
                assert tensor.untyped_storage().nbytes() <= slot.size_bytes
            del got, tensor
    receiver.finish(slot)


def test_a_seal_of_more_than_the_slot_is_refused(pair):
    sender, receiver = pair
    large, seal = send(sender, receiver, torch.ones(5000))
    small, _ = send(sender, receiver, torch.ones(3))
    with pytest.raises(ArgumentValueError):
        receiver.load_tensors(small, seal)
    receiver.finish(large)
    receiver.finish(small)


# --- Arguments ------------------------------------------------------------------------------------


def test_what_is_larger_than_the_slot_is_not_sent(pair, how):
    sender, receiver = pair
    slot, neighbour = receiver.grant(64), receiver.grant(64)
    tree = torch.ones(5000)
    with pytest.raises(ArgumentValueError, match="at most 64"):
        push(sender, tree, receiver.address, slot, how)
    sender.abort("r")
    assert not receiver._engine.memory.any()
    receiver.free(slot)
    receiver.free(neighbour)


@pytest.mark.parametrize(
    "slot",
    [Slot(1, 1 << 20, 64), Slot(1, (1 << 20) - 63, 64), Slot(1, -64, 64), Slot(1, 0.0, 64), None],
)
def test_a_slot_that_cannot_be_at_the_peer_is_refused(pair, how, slot):
    sender, receiver = pair
    with pytest.raises((ArgumentTypeError, ArgumentValueError)):
        push(sender, torch.ones(3), receiver.address, slot, how)
    sender.abort("r")
    assert not receiver._engine.memory.any()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"chunk_bytes": 63}, ArgumentValueError),
        ({"chunk_bytes": 1.5}, ArgumentTypeError),
        ({"connect_timeout_s": 0}, ArgumentValueError),
        ({"checksum": 1}, ArgumentTypeError),
    ],
)
def test_an_option_that_cannot_be_is_refused(manager, options, error):
    good = manager()
    with pytest.raises(error, match="DiffusionTransferManager"):
        DiffusionTransferManager(good._engine, good._backend, **options)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), None])
def test_a_timeout_that_cannot_be_is_refused(pair, timeout_s):
    sender, receiver = pair
    slot = receiver.grant(64)
    staged = sender.stage_tensors("r", torch.ones(3))
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match="timeout_s"):
        sender.push_to_peer(staged, receiver.address, slot, timeout_s)
    staged.free()
    receiver.free(slot)


def test_what_another_manager_staged_is_not_pushed_or_freed(pair):
    sender, receiver = pair
    staged = sender.stage_tensors("r", torch.ones(3))
    with pytest.raises(LeaseError, match="this manager"):
        receiver.free_staged(staged)
    with pytest.raises(LeaseError, match="this manager"):
        receiver.push_to_peer(staged, receiver.address, Slot(1, 0, 64), 5)
    with pytest.raises(ArgumentTypeError, match="stage_tensors"):
        sender.free_staged(None)
    sender.free_staged(staged)


@pytest.mark.parametrize("address", ["shm:/nowhere", "tcp:127.0.0.1:1", "carrier pigeon", 7, ""])
def test_a_peer_that_is_not_there_is_an_error_and_the_tree_stays_staged(pair, address):
    sender, receiver = pair
    staged = sender.stage_tensors("r", torch.ones(3))
    with pytest.raises(HwcoreError):
        sender.push_to_peer(staged, address, Slot(1, 0, 64), 5)
    slot = receiver.grant(64)
    seal = sender.push_to_peer(staged, receiver.address, slot, 5)
    staged.free()
    receiver.consume(slot)
    assert receiver.load_tensors(slot, seal).sum() == 3
    receiver.finish(slot)


# --- Abort ----------------------------------------------------------------------------------------


def test_abort_frees_all_that_is_staged_for_a_request_and_nothing_else(pair):
    sender, receiver = pair
    mine = [sender.stage_tensors("mine", torch.ones(3)) for _ in range(3)]
    other = sender.stage_tensors("other", torch.ones(3))
    assert sender.abort("mine")
    assert sender.abort("mine")
    assert sender.pool.leases() == [other._lease]
    with pytest.raises(LeaseError, match="freed or aborted"):
        sender.push_to_peer(mine[0], receiver.address, Slot(1, 0, 64), 5)
    for staged in mine:
        staged.free()
    other.free()


def test_abort_ends_the_wait_for_room(pair):
    sender, _ = pair
    full = sender.pool.allocate(sender.size_bytes)
    errors = []

    def stage():
        try:
            sender.stage_tensors("mine", torch.ones(3), timeout_s=30)
        except HwcoreError as error:
            errors.append(type(error))

    thread = threading.Thread(target=stage)
    thread.start()
    while not sender.pool.stats().waiting_requests:
        time.sleep(0.001)
    assert sender.abort("mine")
    thread.join(10)
    assert errors == [AllocationCancelledError]
    sender.pool.free(full)


@pytest.fixture
def held(pair, monkeypatch):
    """Start a push that stops before it writes, until it is let go; return what became of it."""
    sender, receiver = pair
    from hwcore.diffusion.engines.peer import HostPeer

    arrived, go_on, outcomes = threading.Event(), threading.Event(), []
    write = HostPeer.write

    def slow(*arguments):
        arrived.set()
        assert go_on.wait(20)
        write(*arguments)

    monkeypatch.setattr(HostPeer, "write", slow)

    def push(staged, slot):
        try:
            outcomes.append(sender.push_to_peer(staged, receiver.address, slot, 20))
        except HwcoreError as error:
            outcomes.append(error)

    def start(staged, slot):
        thread = threading.Thread(target=push, args=(staged, slot))
        thread.start()
        assert arrived.wait(5)

        def finish():
            go_on.set()
            thread.join(20)
            return outcomes[0]

        return finish

    yield start
    go_on.set()


def test_abort_during_a_push_frees_when_it_has_ended_and_makes_it_fail(pair, held):
    sender, receiver = pair
    slot = receiver.grant(64)
    staged = sender.stage_tensors("mine", torch.ones(3))
    finish = held(staged, slot)
    assert not sender.abort("mine", timeout_s=0.05)
    assert sender.stats().pool.live_leases == 1  # it is still read
    assert isinstance(finish(), TransferAbortedError)
    assert sender.abort("mine")
    assert sender.stats().pool.live_leases == 0
    receiver.free(slot)


def test_abort_waits_until_nothing_is_written_any_more(pair, held):
    sender, receiver = pair
    slot = receiver.grant(64)
    finish = held(sender.stage_tensors("mine", torch.ones(3)), slot)
    threading.Timer(0.1, finish).start()
    assert sender.abort("mine", timeout_s=10)
    assert sender.stats().running == 0
    receiver.free(slot)


@pytest.mark.parametrize("kind", ["tcp"], indirect=True)
def test_abort_between_two_chunks_ends_a_send(pair, monkeypatch):
    sender, receiver = pair
    from hwcore.diffusion import ways

    write, pushed = ways.write, []

    def aborting(*arguments):
        pushed.append(1)
        write(*arguments)
        sender.abort("mine", timeout_s=0)

    monkeypatch.setattr(ways, "write", aborting)
    sent = filled(torch.uint8, (20 << 14,))
    slot = receiver.grant(sent.nbytes)
    with pytest.raises(TransferAbortedError, match="mine"):
        sender.send_tensors("mine", sent, receiver.address, slot)
    assert len(pushed) < 4
    receiver.free(slot)


# --- Room, and the end ----------------------------------------------------------------------------


def test_a_full_pool_is_named_with_who_has_it(pair):
    sender, _ = pair
    staged = sender.stage_tensors("the other", torch.ones(sender.size_bytes // 4))
    with pytest.raises(AllocationTimeoutError, match="the other"):
        sender.stage_tensors("mine", torch.ones(3), timeout_s=0.01)
    staged.free()


def test_a_closed_manager_refuses_and_has_let_go_of_everything(manager):
    sender, receiver = manager(), manager()
    staged = sender.stage_tensors("r", torch.ones(3))
    slot, consumed = receiver.grant(64), receiver.grant(64)
    receiver.consume(consumed)
    receiver.close()
    sender.close()
    sender.close()
    for use in (
        lambda: sender.stage_tensors("r", torch.ones(3)),
        lambda: sender.push_to_peer(staged, receiver.address, slot, 5),
        lambda: sender.send_tensors("r", torch.ones(3), receiver.address, slot),
        lambda: receiver.grant(64),
    ):
        with pytest.raises((ClosedError, LeaseError)):
            use()
    receiver.free(slot)
    receiver.finish(consumed)
    assert receiver.granted() == []


def test_closing_waits_for_a_push(pair, held):
    sender, receiver = pair
    slot = receiver.grant(64)
    finish = held(sender.stage_tensors("r", torch.ones(3)), slot)
    timer = threading.Timer(0.1, finish)
    timer.start()
    sender.close(timeout_s=10)
    assert isinstance(finish(), bytes)
    receiver.free(slot)


def test_closing_does_not_wait_for_ever_and_the_push_fails_by_name(pair, held):
    sender, receiver = pair
    slot = receiver.grant(64)
    finish = held(sender.stage_tensors("r", torch.ones(3)), slot)
    with pytest.raises(ClosedError, match="Free the leases"):
        sender.close(timeout_s=0.05)
    assert isinstance(finish(), ClosedError)
    sender.close()
    receiver.free(slot)


def test_closing_names_the_views_that_are_left(manager):
    sender, receiver = manager(), manager()
    slot, seal = send(sender, receiver, torch.ones(3))
    view = receiver.load_tensors(slot, seal)
    with pytest.raises(ClosedError, match="tensors that view it"):
        receiver.close(timeout_s=0)
    assert view.sum() == 3
    del view
    receiver.close()


def test_threads_that_send_to_each_other_at_once_do_not_mix(manager):
    managers = [manager(chunk_bytes=1 << 12) for _ in range(3)]
    errors = []

    def work(number):
        try:
            for turn in range(10):
                sender = managers[number % 3]
                receiver = managers[(number + 1 + turn % 2) % 3]
                sent = torch.full((3000,), number * 100 + turn)
                way = "push" if turn % 3 else "send"
                slot, seal = send(sender, receiver, [sent], way, f"{number}")
                assert torch.equal(receiver.load_tensors(slot, seal)[0], sent)
                receiver.finish(slot)
        except BaseException as error:  # noqa: BLE001 - to be seen by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
