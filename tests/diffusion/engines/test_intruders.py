"""Whoever has no token, or talks nonsense, is counted and dropped, and harms nobody."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time

import pytest
import torch

from hwcore.diffusion.engines import Token, frames, handshake
from hwcore.diffusion.engines.deadline import Deadline
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    PeerError,
    PeerRefusedError,
    PeerTimeoutError,
)

from ._remote import within


def reach(address):
    """Return a bare connection to an engine."""
    scheme, _, place = address.partition(":")
    if scheme == "shm":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(place)
        return sock
    host, _, port = place.rpartition(":")
    return socket.create_connection((host, int(port)))


def ended(sock):
    """Say whether the other side ends a connection within 5 s."""
    sock.settimeout(5)
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def welcomed(sock, engine, token):
    """Go through the handshake and return the session."""
    deadline = Deadline("test", 5)
    session, _, descriptors = handshake.greet(sock, token, engine.name, "00" * 8, "test", deadline)
    for fd in descriptors:
        os.close(fd)
    return session


def test_ten_thousand_random_frames_change_nothing(kind, opened, data):
    receiver, sender = opened(kind), opened(kind)
    peer, rng = sender.connect(receiver.address, 5), random.Random(7)
    for number in range(10_000):
        with reach(receiver.address) as sock:
            junk = rng.randbytes(rng.randrange(200))
            sock.sendall(handshake._MAGIC + junk if number % 2 else junk)
    assert within(10, lambda: sum(receiver.dropped.values()) == 10_000)
    assert set(receiver.dropped) <= {"garbage", "engine", "lost", "busy"}
    assert receiver.writers() == {sender.id: True}
    assert not receiver.memory.any()
    peer.write(data, 0, 5)
    assert torch.equal(receiver.memory[: len(data)], data)
    assert within(5, lambda: sender.connect(receiver.address, 5).alive)


def test_a_wrong_token_is_named_on_both_sides(kind, opened, caplog):
    receiver, stranger = opened(kind), opened(kind, token=Token.create())
    with pytest.raises(PeerRefusedError, match="proved another launch token"):
        stranger.connect(receiver.address, 5)
    assert within(5, lambda: receiver.dropped == {"token": 1})
    assert "its token is another" in caplog.text
    assert receiver.writers() == {}


def test_one_side_without_authentication_is_a_wrong_token(kind, opened):
    with pytest.raises(PeerRefusedError, match=r"or Token\.off\(\) to all"):
        opened(kind, token=Token.off()).connect(opened(kind).address, 5)


def test_without_authentication_works_among_those_who_chose_it_and_is_logged(kind, opened, caplog):
    receiver, sender = (opened(kind, token=Token.off()) for _ in range(2))
    sender.connect(receiver.address, 5).write(torch.ones(3, dtype=torch.uint8), 0, 5)
    assert receiver.memory.sum() == 3
    assert caplog.text.count("whoever reaches it may write") == 2


def test_a_recorded_conversation_is_worth_nothing_later(kind, opened, token):
    receiver, said = opened(kind), []

    class Recorder(socket.socket):
        def sendmsg(self, parts, *rest):
            said.append(b"".join(parts))
            return super().sendmsg(parts, *rest)

    with reach(receiver.address) as sock:
        recorder = Recorder(fileno=os.dup(sock.fileno()))
        welcomed(recorder, receiver, token)
        recorder.close()
    with reach(receiver.address) as sock:
        for part in said:
            sock.sendall(part)
        assert ended(sock)
    assert within(5, lambda: receiver.dropped == {"token": 1})


def test_a_listeners_own_proof_cannot_be_sent_back_to_it(kind, opened):
    receiver = opened(kind)
    with reach(receiver.address) as sock:
        hello = handshake._HELLO.pack(
            handshake._MAGIC, receiver.name.encode().ljust(8, b"\0"), bytes(8), bytes(32)
        )
        sock.sendall(hello)
        proof = sock.recv(handshake._PROOF.size, socket.MSG_WAITALL)
        sock.sendall(proof[-32:])
        assert ended(sock)
    assert within(5, lambda: receiver.dropped == {"token": 1})


@pytest.mark.parametrize(
    ("magic", "engine", "reason"),
    [(b"hwcore\x00\x02", None, "version"), (None, b"other", "engine"), (b"x" * 8, None, "garbage")],
)
def test_another_version_engine_or_program_is_counted_as_such(kind, opened, magic, engine, reason):
    receiver = opened(kind)
    with reach(receiver.address) as sock:
        name = (engine or receiver.name.encode()).ljust(8, b"\0")
        sock.sendall(handshake._HELLO.pack(magic or handshake._MAGIC, name, bytes(8), bytes(32)))
        assert ended(sock)
    assert within(5, lambda: receiver.dropped == {reason: 1})


def test_a_connector_that_says_nothing_is_dropped(kind, opened, monkeypatch):
    monkeypatch.setattr(handshake, "TIMEOUT_S", 0.2)
    receiver = opened(kind)
    with reach(receiver.address) as sock:
        assert ended(sock)
    assert within(5, lambda: receiver.dropped == {"timeout": 1})


def send_slowly(sock):
    with contextlib.suppress(OSError):
        for _ in range(100):
            sock.sendall(handshake._MAGIC[:1])
            time.sleep(0.05)


def test_one_that_trickles_is_dropped_as_well(kind, opened, monkeypatch):
    monkeypatch.setattr(handshake, "TIMEOUT_S", 0.3)
    receiver = opened(kind)
    with reach(receiver.address) as sock:
        trickle = threading.Thread(target=send_slowly, args=(sock,))
        trickle.start()
        assert ended(sock)
        trickle.join()
    assert within(5, lambda: receiver.dropped == {"timeout": 1})


def test_one_connection_too_many_is_closed_at_once(kind, opened):
    receiver, sender = opened(kind, max_peers=2), opened(kind)
    peers = [sender.connect(receiver.address, 5) for _ in range(2)]
    with pytest.raises(PeerRefusedError, match="its limit of peers"):
        sender.connect(receiver.address, 5)
    assert within(5, lambda: receiver.dropped == {"busy": 1})
    peers[0].close()
    assert within(5, lambda: can_connect(sender, receiver))


def can_connect(sender, receiver):
    try:
        sender.connect(receiver.address, 5)
    except PeerError:
        return False
    return True


def test_a_listener_that_never_answers_fails_at_the_deadline(kind, opened, tmp_path):
    with socket.socket(socket.AF_UNIX if kind == "shm" else socket.AF_INET) as silent:
        silent.bind(str(tmp_path / "s") if kind == "shm" else ("127.0.0.1", 0))
        silent.listen()
        place = silent.getsockname()
        address = f"shm:{place}" if kind == "shm" else f"tcp:127.0.0.1:{place[1]}"
        started = time.monotonic()
        with pytest.raises(PeerTimeoutError, match=r"did not answer for 0\.3 s"):
            opened(kind).connect(address, 0.3)
        assert time.monotonic() - started < 3


def test_a_listener_that_talks_nonsense_is_no_engine(kind, opened, tmp_path):
    with socket.socket(socket.AF_UNIX if kind == "shm" else socket.AF_INET) as liar:
        liar.bind(str(tmp_path / "s") if kind == "shm" else ("127.0.0.1", 0))
        liar.listen()

        def lie():
            connection, _ = liar.accept()
            with connection:
                connection.sendall(bytes(range(200)))
                connection.recv(1000)

        thread = threading.Thread(target=lie)
        thread.start()
        place = liar.getsockname()
        address = f"shm:{place}" if kind == "shm" else f"tcp:127.0.0.1:{place[1]}"
        with pytest.raises(PeerRefusedError, match="proved another launch token"):
            opened(kind).connect(address, 5)
        thread.join()


@pytest.mark.parametrize(
    ("address", "error", "part"),
    [
        ("", ArgumentValueError, "begins with"),
        ("udp:127.0.0.1:5", ArgumentValueError, "begins with"),
        ("tcp:127.0.0.1", ArgumentValueError, "tcp:HOST:PORT"),
        ("tcp:127.0.0.1:x", ArgumentValueError, "tcp:HOST:PORT"),
        ("tcp:127.0.0.1:70000", ArgumentValueError, "tcp:HOST:PORT"),
        ("tcp:127.0.0.1:1", PeerError, "refused"),
        (5, ArgumentTypeError, "a str"),
    ],
)
def test_an_address_that_is_none_is_named(kind, opened, address, error, part):
    with pytest.raises(error) as caught:
        opened(kind).connect(address, 5)
    assert part in str(caught.value)


def test_a_socket_that_is_not_there_is_named(opened):
    with pytest.raises(PeerError, match="No such file"):
        opened("shm").connect("shm:/nowhere/engine", 5)
    with pytest.raises(PeerError, match="too long"):
        opened("shm").connect("shm:/" + "x" * 200, 5)


# --- Frames of a peer that has the token ----------------------------------------------------------


def frame(key, sequence=0, offset=0, size=4, checksum=None):
    return frames.Header(sequence, offset, size, checksum).packed(key)


def changed(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda key: changed(frame(key)), "frame"),
        (lambda key: frame(bytes(32)), "frame"),
        (lambda key: frame(key, sequence=1), "frame"),
        (lambda key: bytes(frames.HEADER_BYTES), "frame"),
        (lambda key: frame(key)[:20], "lost"),
        (lambda key: frame(key, offset=(1 << 20) - 3), "bounds"),
        (lambda key: frame(key, offset=(1 << 64) - 2), "bounds"),
        (lambda key: frame(key, size=1 << 63), "bounds"),
        (lambda key: frame(key, size=100), "lost"),
    ],
    ids=["bit", "key", "sequence", "zeros", "half", "end", "wrap", "huge", "short"],
)
def test_a_bad_frame_ends_its_connection_and_no_other(opened, token, make, reason):
    receiver = opened("tcp")
    other = opened("tcp").connect(receiver.address, 5)
    with reach(receiver.address) as sock:
        session = welcomed(sock, receiver, token)
        sock.sendall(make(session.key) + b"four")
        with contextlib.suppress(OSError):  # ended already
            sock.shutdown(socket.SHUT_WR)
        assert ended(sock)
    assert within(5, lambda: receiver.dropped == {reason: 1})
    assert reason == "lost" or not receiver.memory.any()
    other.write(torch.ones(3, dtype=torch.uint8), 0, 5)


def test_a_frame_sent_twice_is_taken_once(opened, token):
    receiver = opened("tcp")
    with reach(receiver.address) as sock:
        session = welcomed(sock, receiver, token)
        sock.sendall((frame(session.key) + b"four") * 2)
        assert ended(sock)
    assert within(5, lambda: receiver.dropped == {"frame": 1})
    assert bytes(receiver.memory[:4].tolist()) == b"four"


def test_bytes_that_changed_on_the_way_are_reported_and_the_next_may_land(opened, monkeypatch):
    from hwcore.diffusion.engines import tcp

    receiver = opened("tcp")
    peer, ones = opened("tcp").connect(receiver.address, 5), torch.ones(3, dtype=torch.uint8)
    right = tcp.xxhash.xxh3_64_intdigest
    with monkeypatch.context() as patch:
        sums = iter([1])
        patch.setattr(tcp.xxhash, "xxh3_64_intdigest", lambda view: next(sums, None) or right(view))
        with pytest.raises(PeerError, match="have another checksum"):
            peer.write(ones, 0, 5)
    assert receiver.dropped == {"checksum": 1}
    peer.write(ones, 0, 5)
    assert peer.alive


def test_an_answer_that_was_not_signed_is_not_believed(opened, monkeypatch):
    from hwcore.diffusion.engines import tcp

    receiver = opened("tcp")
    peer = opened("tcp").connect(receiver.address, 5)
    monkeypatch.setattr(tcp, "answer", lambda *_: bytes(frames.ANSWER_BYTES))
    with pytest.raises(PeerError, match="an answer that it did not sign"):
        peer.write(torch.ones(3, dtype=torch.uint8), 0, 5)
    assert not peer.alive


@pytest.mark.parametrize("checksum", [None, 0, 2**64 - 1])
def test_any_bit_of_a_header_or_answer_that_changed_is_seen(checksum):
    key = bytes(range(32))
    header = frames.Header(3, 2**40, 2**63, checksum)
    assert frames.Header.unpacked(header.packed(key), key) == header
    said = frames.answer(3, frames.Status.CHECKSUM, key)
    assert frames.answered(said, 3, key) is frames.Status.CHECKSUM
    assert frames.answered(said, 4, key) is None
    for data, read in (
        (header.packed(key), lambda data: frames.Header.unpacked(data, key)),
        (said, lambda data: frames.answered(data, 3, key)),
    ):
        for bit in range(8 * len(data)):
            broken = bytearray(data)
            broken[bit // 8] ^= 1 << bit % 8
            assert read(bytes(broken)) is None
