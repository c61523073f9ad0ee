"""Two processes, of which one is killed, stopped or wakes: an error with a name, and it goes on."""

import contextlib
import os
import signal
import threading
import time

import pytest
import torch

from hwcore.errors import LateWriteError, PeerError, PeerTimeoutError

from ._tensors import filled, same
from .engines._remote import Remote, stop, within


@pytest.fixture(autouse=True)
def _of_the_host_alone(once):
    """No device is part of it."""


@pytest.fixture
def remote(token, kind):
    """Start another process with a manager, called `manager` there."""
    with contextlib.ExitStack() as stack:

        def start(size_bytes=1 << 20):
            other = Remote(kind, token, size_bytes)
            stack.callback(other.close)
            other.ask("import hwcore; from hwcore.diffusion import DiffusionTransferManager")
            other.ask("from hwcore.diffusion.messages import Slot")
            other.ask("manager = DiffusionTransferManager(engine, hwcore.use('cpu'))")
            other.ask("tree = {'a': torch.arange(9000.0), 'b': [torch.ones(3), None]}")
            return other

        yield start


def slot_of(other, size_bytes):
    """Have the other process grant a slot."""
    from hwcore.diffusion.messages import Slot

    got = other.ask(f"slot = manager.grant({size_bytes}); slot and str(slot)")
    assert got is None
    return eval(other.ask("repr(slot)"), {"Slot": Slot})


@pytest.fixture
def tree():
    return {"a": torch.arange(9000.0), "b": [torch.ones(3), None]}


@pytest.fixture(params=["send", "push"])
def deliver(request):
    """Send a tree; or push it, staged before."""

    def by_send(sender, tree, address, slot, timeout_s=5):
        return sender.send_tensors("r", tree, address, slot, timeout_s=timeout_s)

    def by_push(sender, tree, address, slot, timeout_s=5):
        staged = sender.stage_tensors("r", tree)
        try:
            return sender.push_to_peer(staged, address, slot, timeout_s)
        finally:
            staged.free()

    return by_send if request.param == "send" else by_push


def test_a_tree_arrives_in_another_process(manager, remote, tree, deliver):
    sender, other = manager(), remote()
    slot = slot_of(other, sender.size_of(tree))
    seal = deliver(sender, tree, other.address, slot)
    assert other.ask("manager.consume(slot)") is True
    other.ask(f"got = manager.load_tensors(slot, {seal!r})")
    assert other.ask("torch.equal(got['a'], tree['a']), got['b'][1]") == (True, None)
    other.ask("manager.finish(slot); del got")
    assert other.ask("manager.stats().pool.ranges.live_blocks") == 0


def test_a_killed_receiver_is_an_error_and_the_next_one_gets_it(manager, remote, tree):
    sender, first, second = manager(), remote(), manager()
    slot = slot_of(first, sender.size_of(tree))
    staged = sender.stage_tensors("r", tree)
    sender.push_to_peer(staged, first.address, slot, 5)  # it is connected
    first.kill()
    with pytest.raises(PeerError):
        sender.push_to_peer(staged, first.address, slot, 5)
    here = second.grant(staged.size_bytes)
    seal = sender.push_to_peer(staged, second.address, here, 5)
    staged.free()
    assert second.consume(here)
    same(second.load_tensors(here, seal)["a"], tree["a"])
    second.finish(here)


def test_a_receiver_that_is_killed_during_a_send_crashes_nobody(manager, remote, kind):
    sender, other = manager(16 << 20), remote(64 << 20)
    tree = filled(torch.uint8, (48 << 20,))
    slot = slot_of(other, tree.nbytes)
    sender.send_tensors("r", tree, other.address, slot)
    threading.Timer(0.05, other.kill).start()

    def send_until_it_fails():
        for _ in range(1000):
            sender.send_tensors("r", tree, other.address, slot)

    with pytest.raises(PeerError):
        send_until_it_fails()
    sender.settle()
    assert sender.stats().peers == 0  # and its memory is not mapped here any more
    assert sender.stats().pool.live_leases == 0


@pytest.mark.parametrize("kind", ["shm"], indirect=True)
def test_what_was_written_into_the_mapping_of_a_killed_receiver_has_no_seal(
    manager, remote, tree, monkeypatch
):
    from hwcore.diffusion.gathering import Gathering

    sender, other = manager(), remote()
    slot = slot_of(other, sender.size_of(tree))
    gather = Gathering.gather

    def killing(gathering, *arguments):
        other.kill()
        gather(gathering, *arguments)

    monkeypatch.setattr(Gathering, "gather", killing)
    with pytest.raises(PeerError, match="ended while it was written to"):
        sender.send_tensors("r", tree, other.address, slot)


@pytest.mark.parametrize("kind", ["tcp"], indirect=True)
def test_a_receiver_that_hangs_is_late_and_is_reached_again_when_it_wakes(manager, remote, deliver):
    sender, other = manager(8 << 20), remote(64 << 20)
    tree = filled(torch.uint8, (7 << 20,))
    slot = slot_of(other, tree.nbytes)
    deliver(sender, tree[:1000], other.address, slot)
    stop(other.process.pid)
    try:
        with pytest.raises(LateWriteError):
            deliver(sender, tree[: 3 << 20], other.address, slot, 0.3)
        assert sender.stats().peers == 0
    finally:
        os.kill(other.process.pid, signal.SIGCONT)
    seal = deliver(sender, tree[:5000], other.address, slot)
    other.ask("manager.consume(slot)")
    assert other.ask(f"manager.load_tensors(slot, {seal!r}).numel()") == 5000


@pytest.mark.parametrize("kind", ["tcp"], indirect=True)
def test_that_bytes_may_land_late_is_heard_whatever_else_ended_a_send(manager, remote):
    sender, other = manager(8 << 20, chunk_bytes=1 << 20), remote(64 << 20)
    tree = filled(torch.uint8, (7 << 20,))
    slot = slot_of(other, tree.nbytes)
    sender.send_tensors("r", tree[:1000], other.address, slot)
    stop(other.process.pid)
    stages = []

    def fail_at_the_second_part(what, started, ended):
        stages.append(what)
        if len(stages) == 2:
            raise KeyError(what)

    with pytest.raises(LateWriteError) as caught:
        sender.send_tensors(
            "r", tree, other.address, slot, timeout_s=0.3, on_part=fail_at_the_second_part
        )
    assert isinstance(caught.value.__cause__, KeyError)
    os.kill(other.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("kind", ["tcp"], indirect=True)
def test_who_pushes_to_one_peer_does_not_wait_for_another_that_hangs(manager, remote, tree):
    sender, hung, other = manager(8 << 20), remote(), manager()
    slot = slot_of(hung, sender.size_of(tree))
    sender.send_tensors("r", tree, hung.address, slot)
    stop(hung.process.pid)
    errors = []

    def push():
        try:
            sender.send_tensors("hung", torch.zeros(200_000), hung.address, large, timeout_s=3)
        except PeerError as error:
            errors.append(type(error))

    large = type(slot)(slot.lease, 0, 1 << 20)
    thread = threading.Thread(target=push)
    thread.start()
    while not sender.stats().running:
        time.sleep(0.001)
    started = time.monotonic()
    here = other.grant(sender.size_of(tree))
    for _ in range(5):
        sender.send_tensors("r", tree, other.address, here)
    assert time.monotonic() - started < 2
    assert thread.is_alive()
    thread.join(10)
    os.kill(hung.process.pid, signal.SIGCONT)
    (kind_of_error,) = errors
    assert issubclass(kind_of_error, PeerTimeoutError)
    other.free(here)


# --- Writers that were taken for dead -------------------------------------------------------------


def test_a_writer_that_was_stopped_and_connects_later_finds_no_way(manager, remote):
    receiver, writer = manager(), remote()
    slot = receiver.grant(1 << 16)
    stop(writer.process.pid)
    receiver.free(slot, writer.id)
    again = receiver.grant(1 << 16)  # it has never been connected: nothing can come
    assert again.offset == slot.offset
    os.kill(writer.process.pid, signal.SIGCONT)
    name, _ = writer.ask(f"manager.send_tensors('r', tree, {receiver.address!r}, {slot!r})")
    assert name == "PeerRefusedError"
    assert not receiver._engine.memory.any()
    receiver.free(again)


def test_a_slot_of_a_connected_writer_is_not_reused_while_it_can_write(manager, remote, kind):
    receiver, writer = manager(), remote()
    size = receiver.size_bytes
    slot = receiver.grant(size)
    writer.ask(f"manager.send_tensors('r', tree, {receiver.address!r}, {slot!r})")
    stop(writer.process.pid)
    receiver.free(slot, writer.id)
    receiver.free(slot, writer.id)
    assert receiver.granted() == []
    if kind == "shm":  # its mapping cannot be taken away
        for _ in range(3):
            receiver.settle()
            assert receiver.grant(size) is None
        assert receiver.stats().quarantined_writers == 1
        writer.kill()

    def is_free():
        receiver.settle()
        again = receiver.grant(size)
        if again is not None:
            receiver.free(again)
        return again is not None

    assert within(5, is_free)
    assert receiver.stats().quarantined_writers == 0


def test_an_id_that_is_none_changes_nothing(manager):
    receiver = manager()
    slot = receiver.grant(64)
    with pytest.raises(ValueError, match="16 hexadecimal digits"):
        receiver.free(slot, "an address")
    assert receiver.granted() == [slot]
    receiver.free(slot)
