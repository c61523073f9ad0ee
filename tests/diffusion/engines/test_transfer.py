"""What every engine does: bytes land in the pool of another process, or an error says why."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time

import pytest
import torch

from hwcore.diffusion.checksum import checksum
from hwcore.diffusion.engines import tcp
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ClosedError,
    LateWriteError,
    PeerError,
    PeerTimeoutError,
)

from ._remote import stop, within


def test_bytes_land_in_another_process_where_they_were_sent(kind, opened, remote, data):
    other = remote(kind)
    with opened(kind).connect(other.address, 5) as peer:
        peer.write(data, 1000, 5)
        other.ask("from hwcore.diffusion.checksum import checksum")
        assert other.ask(f"checksum(engine.memory[1000:{1000 + len(data)}])") == checksum(data)
        assert other.ask("engine.memory[:1000].sum().item()") == 0
        assert other.ask(f"engine.memory[{1000 + len(data)}:].sum().item()") == 0


def test_writes_follow_each_other_and_fill_the_pool_to_its_last_byte(kind, opened, data):
    receiver = opened(kind, len(data))
    peer = opened(kind).connect(receiver.address, 5)
    for size in (1, 4096, 65537):
        peer.write(data[:size], len(data) - size, 5)
        assert torch.equal(receiver.memory[len(data) - size :], data[:size])
    peer.write(data, 0, 5)
    assert torch.equal(receiver.memory, data)


def test_threads_that_write_at_once_do_not_mix(kind, opened):
    receiver = opened(kind)
    peer = opened(kind).connect(receiver.address, 5)

    def write(value):
        source = torch.full((1000,), value, dtype=torch.uint8)
        for _ in range(20):
            peer.write(source, value * 1000, 5)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.arange(8, dtype=torch.uint8).repeat_interleave(1000)
    assert torch.equal(receiver.memory[:8000], expected)


def test_nothing_is_written_by_an_empty_source(kind, opened):
    receiver = opened(kind)
    peer = opened(kind).connect(receiver.address, 5)
    peer.write(torch.empty(0, dtype=torch.uint8), receiver.size_bytes, 5)
    assert peer.alive


@pytest.mark.parametrize(
    ("source", "offset", "timeout_s", "error", "part"),
    [
        (10, 1 << 20, 5, ArgumentValueError, "0 to 1048566, for 10 bytes"),
        (10, -1, 5, ArgumentValueError, "-1 (int)"),
        (10, (1 << 20) - 9, 5, ArgumentValueError, "within the peer's pool of 1048576 bytes"),
        (10, 0.0, 5, ArgumentTypeError, "an int"),
        (10, True, 5, ArgumentTypeError, "an int"),
        (10, 0, 0, ArgumentValueError, "more than 0"),
        (10, 0, float("inf"), ArgumentValueError, "finite"),
        (10, 0, None, ArgumentTypeError, "a number"),
        (None, 0, 5, ArgumentTypeError, "torch.Tensor"),
    ],
)
def test_a_write_that_cannot_be_is_refused_and_the_peer_goes_on(
    kind, opened, source, offset, timeout_s, error, part
):
    receiver = opened(kind)
    peer = opened(kind).connect(receiver.address, 5)
    ones = source and torch.ones(source, dtype=torch.uint8)
    with pytest.raises(error) as caught:
        peer.write(ones, offset, timeout_s)
    assert part in str(caught.value)
    assert not receiver.memory.any()
    peer.write(torch.ones(3, dtype=torch.uint8), 0, 5)
    assert receiver.memory.sum() == 3


# --- Ends -----------------------------------------------------------------------------------------


def test_a_killed_receiver_is_seen_without_writing(kind, opened, remote):
    other = remote(kind)
    peer = opened(kind).connect(other.address, 5)
    assert peer.alive
    assert select.select([peer], [], [], 0)[0] == []
    other.kill()
    assert select.select([peer], [], [], 5)[0] == [peer]
    assert not peer.alive
    with pytest.raises(PeerError, match="it is gone; expected the bytes to land"):
        peer.write(torch.ones(3, dtype=torch.uint8), 0, 5)


def test_a_killed_writer_is_known_to_write_no_more(kind, opened, remote):
    receiver, other = opened(kind), remote(kind)
    assert other.ask(f"peer = engine.connect({receiver.address!r}, 5)") is None
    assert within(5, lambda: receiver.writers() == {other.id: True})
    other.kill()
    assert within(5, lambda: receiver.writers() == {other.id: False})


def test_a_stopped_writer_can_still_write(kind, opened, remote):
    receiver, other = opened(kind), remote(kind)
    other.ask(f"peer = engine.connect({receiver.address!r}, 5)")
    assert within(5, lambda: receiver.writers() == {other.id: True})
    stop(other.process.pid)
    assert not within(0.3, lambda: receiver.writers() != {other.id: True})


def test_a_writer_that_closed_is_known_to_write_no_more(kind, opened):
    receiver, sender = opened(kind), opened(kind)
    peers = [sender.connect(receiver.address, 5) for _ in range(2)]
    peers[0].close()
    assert not within(0.3, lambda: receiver.writers() != {sender.id: True})
    peers[1].close()
    assert within(5, lambda: receiver.writers() == {sender.id: False})


def test_only_the_latest_of_the_dead_writers_are_listed(kind, opened, monkeypatch):
    from hwcore.diffusion.engines import host

    monkeypatch.setattr(host, "_WRITERS_LISTED", 3)
    receiver = opened(kind)
    alive = opened(kind)
    alive.connect(receiver.address, 5)
    ids = []
    for _ in range(5):
        sender = opened(kind)
        sender.connect(receiver.address, 5).close()
        ids.append(sender.id)
        assert within(5, lambda sender=sender: receiver.writers()[sender.id] is False)
    assert receiver.writers()[alive.id] is True
    assert list(receiver.writers())[-2:] == ids[-2:]
    assert len(receiver.writers()) == 3


def test_a_closed_peer_and_a_closed_engine_take_nothing(kind, opened):
    receiver, sender = opened(kind), opened(kind)
    address, peer = receiver.address, sender.connect(receiver.address, 5)
    peer.close()
    peer.close()
    assert (peer.alive, peer.fileno()) == (False, -1)
    with pytest.raises(ClosedError, match="Connect again"):
        peer.write(torch.ones(3, dtype=torch.uint8), 0, 5)
    receiver.close()
    receiver.close()
    for use in ("address", "memory", "dropped"):
        with pytest.raises(ClosedError, match="it is closed"):
            getattr(receiver, use)
    with pytest.raises(ClosedError):
        receiver.connect(address, 1)
    with pytest.raises(PeerError, match="expected an engine that listens"):
        sender.connect(address, 1)


def test_closing_an_engine_closes_its_peers(kind, opened):
    receiver, sender = opened(kind), opened(kind)
    peer = sender.connect(receiver.address, 5)
    sender.close()
    with pytest.raises(ClosedError):
        peer.write(torch.ones(3, dtype=torch.uint8), 0, 5)
    assert within(5, lambda: receiver.writers() == {sender.id: False})


def test_views_of_the_pool_outlive_the_engine(kind, opened, data):
    receiver = opened(kind)
    opened(kind).connect(receiver.address, 5).write(data, 0, 5)
    view = receiver.memory[: len(data)]
    receiver.close()
    assert torch.equal(view, data)


def mappings():
    with open("/proc/self/maps") as file:
        return sum(int(end, 16) - int(start, 16) for line in file for start, end in
                   [line.split()[0].split("-")])  # fmt: skip


def held():
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_nothing_is_left_of_engines_that_were_closed(kind, opened, data):
    opened(kind).close()
    before, size = held(), 64 << 20
    mapped = mappings()
    for _ in range(5):
        receiver, sender = opened(kind, size), opened(kind)
        address = receiver.address
        peer = sender.connect(address, 5)
        peer.write(data, 0, 5)
        del peer
        receiver.close()
        sender.close()
        if kind == "shm":
            assert not os.path.exists(os.path.dirname(address.removeprefix("shm:")))
    assert within(5, lambda: held() == before)
    assert within(5, lambda: mappings() < mapped + size)  # threads' stacks come and stay


# --- Peers that hang ------------------------------------------------------------------------------


def test_a_stopped_receiver_fails_a_tcp_write_at_its_deadline(opened, remote):
    other = remote("tcp", 64 << 20)
    peer = opened("tcp").connect(other.address, 5)
    stop(other.process.pid)
    started = time.monotonic()
    with pytest.raises(LateWriteError, match=r"no answer after 0\.5 s.*They may still land"):
        peer.write(torch.ones(64 << 20, dtype=torch.uint8), 0, 0.5)
    assert time.monotonic() - started < 5
    with pytest.raises(PeerError, match="a write before this one was cut short"):
        peer.write(torch.ones(1, dtype=torch.uint8), 0, 5)
    os.kill(other.process.pid, signal.SIGCONT)
    assert other.ask("engine.address") == other.address  # it survived the half of a frame
    peer.close()


def test_what_timed_out_for_certain_changes_nothing_when_the_receiver_wakes(kind, opened, remote):
    other, ones = remote(kind), torch.ones(1 << 20, dtype=torch.uint8)
    peer = opened(kind).connect(other.address, 5)
    stop(other.process.pid)
    with peer._turn, pytest.raises(PeerTimeoutError) as waited:  # as another thread's write has it
        peer.write(ones, 0, 0.1)
    with pytest.raises(PeerTimeoutError) as connected:
        opened(kind).connect(other.address, 0.3)
    os.kill(other.process.pid, signal.SIGCONT)
    assert not isinstance(waited.value, LateWriteError)
    assert not isinstance(connected.value, LateWriteError)
    assert not within(0.3, lambda: other.ask("int(engine.memory.sum())"))


def test_a_tcp_receiver_that_wakes_while_a_late_write_looks_takes_nothing_after_it(
    opened, remote, monkeypatch
):
    other = remote("tcp", 64 << 20)
    monkeypatch.setattr(tcp, "_END_S", 20.0)
    peer = opened("tcp").connect(other.address, 5)
    stop(other.process.pid)
    waking = threading.Timer(0.6, os.kill, (other.process.pid, signal.SIGCONT))
    waking.start()
    with pytest.raises(PeerTimeoutError, match="no answer") as caught:
        peer.write(torch.ones(64 << 20, dtype=torch.uint8), 0, 0.2)
    assert waking.finished.is_set()  # before that nobody could know
    landed = other.ask("int(engine.memory.sum())")
    assert not isinstance(caught.value, LateWriteError)
    assert 0 < landed < 64 << 20
    assert not within(0.3, lambda: other.ask("int(engine.memory.sum())") != landed)


def test_a_tcp_write_into_a_silent_network_may_land_late(opened, remote):
    other = remote("tcp", 64 << 20)
    peer = opened("tcp").connect(other.address, 5)
    peer._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300)
    stop(other.process.pid)
    with pytest.raises(LateWriteError, match=r"Connection timed out.*They may still land"):
        peer.write(torch.ones(64 << 20, dtype=torch.uint8), 0, 20)
    os.kill(other.process.pid, signal.SIGCONT)
    assert within(5, lambda: other.ask("int(engine.memory.sum())"))  # it did


def test_after_a_tcp_write_that_was_only_slow_nothing_lands_any_more(opened, remote, monkeypatch):
    other = remote("tcp", 256 << 20)
    monkeypatch.setattr(tcp, "_END_S", 20.0)
    peer = opened("tcp").connect(other.address, 5)
    with pytest.raises(PeerTimeoutError, match="no answer") as caught:
        peer.write(torch.ones(256 << 20, dtype=torch.uint8), 0, 0.005)
    assert not isinstance(caught.value, LateWriteError)
    landed = other.ask("int(engine.memory.sum())")
    time.sleep(0.3)
    assert other.ask("int(engine.memory.sum())") == landed < 256 << 20
    peer.close()


def test_what_may_land_late_lands_no_more_once_the_writer_is_known_to_have_closed(opened, remote):
    other, engine = remote("tcp", 64 << 20), opened("tcp")
    peer = engine.connect(other.address, 5)
    stop(other.process.pid)
    with pytest.raises(LateWriteError):
        peer.write(torch.ones(64 << 20, dtype=torch.uint8), 0, 0.2)
    engine.close()
    os.kill(other.process.pid, signal.SIGCONT)
    assert within(5, lambda: other.ask("engine.writers()") == {engine.id: False})
    landed = other.ask("int(engine.memory.sum())")
    time.sleep(0.3)
    assert other.ask("int(engine.memory.sum())") == landed


def test_a_tcp_write_waits_for_another_threads_no_longer_than_its_deadline(opened, remote):
    other = remote("tcp", 64 << 20)
    peer = opened("tcp").connect(other.address, 5)
    stop(other.process.pid)
    late = []

    def write():
        with pytest.raises(PeerTimeoutError) as caught:
            peer.write(torch.ones(64 << 20, dtype=torch.uint8), 0, 2)
        late.append(caught.value)

    thread = threading.Thread(target=write)
    thread.start()
    assert within(5, peer._turn.locked)
    with pytest.raises(PeerTimeoutError, match="another thread's write has not ended"):
        peer.write(torch.ones(1, dtype=torch.uint8), 0, 0.2)
    thread.join()
    assert late


def test_closing_ends_a_tcp_write_that_runs(opened, remote):
    other = remote("tcp", 64 << 20)
    peer = opened("tcp").connect(other.address, 5)
    stop(other.process.pid)
    ended = []

    def write():
        with pytest.raises(ClosedError, match="closed meanwhile") as caught:
            peer.write(torch.ones(64 << 20, dtype=torch.uint8), 0, 60)
        ended.append(caught.value)

    thread = threading.Thread(target=write)
    thread.start()
    assert within(5, peer._turn.locked)
    time.sleep(0.1)
    peer.close()
    thread.join(5)
    assert ended
    assert not thread.is_alive()


def test_a_writer_killed_within_a_frame_is_counted_and_known_dead(opened, remote):
    receiver, other = opened("tcp", 64 << 20), remote("tcp")
    other.ask(f"peer = engine.connect({receiver.address!r}, 5)")
    other.tell("while True: peer.write(torch.ones(64 << 20, dtype=torch.uint8), 0, 60)")
    assert within(10, lambda: receiver.memory[0] == 1)
    other.kill()
    assert within(5, lambda: receiver.writers() == {other.id: False})
    assert set(receiver.dropped) <= {"lost"}
    sender = opened("tcp")
    sender.connect(receiver.address, 5).write(torch.zeros(5, dtype=torch.uint8), 0, 5)
    assert receiver.memory[:5].tolist() == [0] * 5


def test_a_writer_that_stops_within_a_frame_is_dropped(opened, remote, monkeypatch):
    from hwcore.diffusion.engines import tcp

    monkeypatch.setattr(tcp, "STALL_S", 0.3)
    receiver, other = opened("tcp", 64 << 20), remote("tcp")
    other.ask(f"peer = engine.connect({receiver.address!r}, 5)")
    other.tell("while True: peer.write(torch.ones(64 << 20, dtype=torch.uint8), 0, 60)")
    assert within(10, lambda: receiver.memory[0] == 1)
    for _ in range(50):  # it may be between two frames when it stops
        stop(other.process.pid)
        if within(0.6, lambda: receiver.writers() == {other.id: False}):
            break
        os.kill(other.process.pid, signal.SIGCONT)
        time.sleep(0.01)
    assert receiver.writers() == {other.id: False}
    assert receiver.dropped == {"timeout": 1}
