"""Garbage at every socket, from strangers and from who has the token: the service goes on."""

import contextlib
import random
import socket as sockets

import pytest
import zmq

from hwcore.diffusion import messages
from hwcore.diffusion.messages import (
    Abort,
    Aborted,
    Alive,
    Cancel,
    Computed,
    Drain,
    Failed,
    Finished,
    Forget,
    Granted,
    Heartbeat,
    Progress,
    Push,
    Pushed,
    Refused,
    Register,
    Registered,
    Release,
    Reset,
    Result,
    Slot,
    Submit,
    Unknown,
    Want,
    Welcome,
    Work,
    encode,
)
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.router import RouterConfig, WorkerLink
from hwcore.diffusion.router import sockets as router_sockets
from hwcore.diffusion.router.security import Security
from hwcore.errors import PeerError, RequestError

from ._peers import Memory, answer_to, within

RANDOM, MUTATED = 10_000, 1_000
SLOT = Slot(7, 0, 100)
FROM_CLIENT = [
    Submit("garbage", 1, 5.0, [RoleType.DECODER], True),
    Cancel("garbage", 1),
    Alive([("garbage", 1), ("r", 0)]),
]
FROM_WORKER = [
    Register(RoleType.IMAGE_ENCODER, 5, "address", "e" * 16, 4, 1000, [SLOT]),
    Heartbeat(5, 9, [1, 2, 3], [SLOT]),
    Granted(5, [SLOT]),
    Computed(5, 1, 100),
    Pushed(5, 1, 1),
    Finished(5, 1),
    Failed(5, 1, 0, "text", True),
    Aborted(5, 1),
]
TO_CLIENT = [
    Progress("r", 0, RoleType.DECODER, 1),
    Result("garbage", 1),
    Refused("garbage", 1, "busy", "text", True),
    Welcome(0.1, 1 << 20),
    Unknown("garbage", 1),
]
TO_WORKER = [
    Registered(5, 0.1, 1 << 20),
    Reset(5, 9),
    Work(5, 1, "r", 5.0, False, SLOT),
    Push(5, 1, 1, "address", SLOT),
    Forget(5, 1),
    Abort(5, 1),
    Want(5, 100),
    Release(5, SLOT, "e" * 16),
    Drain(5),
]


def mutated(chance, frame):
    """Change, cut, double or append bytes."""
    changed = bytearray(frame)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(changed))
        match chance.randrange(4):
            case 0:
                changed[place] = chance.randrange(256)
            case 1:
                del changed[place:]
            case 2:
                changed[place:place] = changed[: chance.randrange(40)]
            case 3:
                changed += chance.randbytes(chance.randrange(40))
        changed = changed or bytearray(b"\x01")
    return bytes(changed)


def garbage(seed, valid):
    """Yield messages: random frames, then valid ones with bytes changed; some with more frames."""
    chance = random.Random(seed)
    for _ in range(RANDOM):
        beginning = chance.choice([b"", b"\x01", b"\x01\x95", b"\x02"])
        frames = [beginning + chance.randbytes(chance.randrange(80))]
        frames += [chance.randbytes(chance.randrange(20)) for _ in range(chance.choice([0, 0, 3]))]
        yield frames
    for _ in range(MUTATED):
        frames = [mutated(chance, encode(chance.choice(valid)))]
        frames += [chance.randbytes(chance.randrange(20)) for _ in range(chance.choice([0, 1, 2]))]
        yield frames


def malformed(messages_said, kind):
    """Say how many of these are no message."""
    count = 0
    for frames in messages_said:
        try:
            messages.decode(frames[0], kind)
        except PeerError:
            count += 1
    return count


@pytest.fixture
def member(stack, token):
    """Connect a socket of one that has the token."""
    context = stack.enter_context(zmq.Context())

    def connect(router, party, identity=b"member"):
        socket = context.socket(zmq.DEALER)
        stack.callback(socket.close, 0)
        socket.identity = identity
        socket.sndhwm = 0
        Security(token, "test").join(socket, party)
        socket.connect(getattr(router, f"{party}_address"))
        return socket

    return connect


def check_service(client, name):
    assert client.submit(name, {"text": name}, deadline_s=20).result(20)["text"] == answer_to(name)


@pytest.mark.parametrize("party", ["client", "worker"])
def test_garbage_of_one_that_has_the_token_is_dropped_and_counted(
    party, router, workers, client, member
):
    made = workers(router)
    kind = messages.FromClient if party == "client" else messages.FromWorker
    said = list(garbage(1, FROM_CLIENT if party == "client" else FROM_WORKER))
    socket = member(router, party)
    for number, frames in enumerate(said):
        socket.send_multipart(frames)
        if number % 1000 == 0:
            check_service(client, f"r{number}")
    expected = malformed(said, kind)
    assert expected > 10_000
    assert within(20, lambda: router.stats().dropped.get("malformed", 0) >= expected)
    check_service(client, "last")
    dropped = router.stats().dropped
    assert "error" not in dropped, "no handler failed"
    assert set(dropped) <= {"malformed", "unread", "absent"}
    assert [echo.restarts for echo in made] == [0, 0, 0]
    assert within(20, lambda: router.stats().is_settled)


@pytest.mark.parametrize("party", ["client", "worker"])
def test_garbage_of_strangers_reaches_nobody(party, router, workers, client):
    """Bytes that are no handshake, in frames of ZMTP and without; one connection for each lot."""
    workers(router)
    chance = random.Random(2)
    said = [b"".join(frames) for frames in garbage(3, FROM_WORKER + FROM_CLIENT)]
    port = int(getattr(router, f"{party}_address").rpartition(":")[2])
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    for start in range(0, len(said), 250):
        with sockets.create_connection(("127.0.0.1", port)) as stranger:
            lot = b"".join(said[start : start + 250])
            with contextlib.suppress(OSError):  # it has had enough
                stranger.sendall(chance.choice([b"", greeting]) + lot)
        if start % 2500 == 0:
            check_service(client, f"r{start}")
    check_service(client, "last")
    stats = router.stats()
    assert (stats.clients, len(stats.workers)) == (1, 3)
    assert set(stats.dropped) == {"handshake"}


@pytest.fixture
def false_router(stack, token):
    """Bind a socket that has the token as a router, and answers with what a test likes."""
    context = stack.enter_context(zmq.Context())

    def bind(party):
        socket = context.socket(zmq.ROUTER)
        stack.callback(socket.close, 0)
        socket.sndhwm = 0
        Security(token, "test").accept(socket, party)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        return socket, f"tcp://127.0.0.1:{port}"

    return bind


def test_a_client_outlives_garbage_of_its_router(false_router, client_of):
    import threading

    socket, address = false_router("client")
    said = list(garbage(4, TO_CLIENT))

    def misbehave():
        name, _ = socket.recv_multipart()
        socket.send_multipart([name, encode(Welcome(0.1, 1 << 20))])
        for frames in said:
            socket.send_multipart([name, *frames])
        socket.send_multipart([name, encode(Welcome(0.1, 1 << 20))])
        while True:
            name, frame, *_ = socket.recv_multipart()
            if isinstance(messages.decode(frame, messages.FromClient), Submit):
                socket.send_multipart([name, encode(Refused("q", 0, "busy", "at last", True))])
                return

    thread = threading.Thread(target=misbehave)
    thread.start()
    client = client_of(address)
    assert within(
        20, lambda: client.drops.get("malformed", 0) >= malformed(said, messages.ToClient)
    )
    with pytest.raises(RequestError, match="at last"):
        client.submit("q", {}, deadline_s=20).result(20)
    thread.join(10)
    assert set(client.drops) == {"malformed"}


def test_a_worker_outlives_garbage_of_its_router(false_router, token):
    socket, address = false_router("worker")
    said = list(garbage(5, TO_WORKER))
    with WorkerLink(
        address, token, name="w", role=RoleType.ENCODER, memory=Memory(), capacity=4
    ) as link:
        name, frame = socket.recv_multipart()
        epoch = messages.decode(frame, messages.FromWorker).epoch
        for frames in said:
            socket.send_multipart([name, *frames])
        socket.send_multipart([name, encode(Registered(epoch, 0.1))])
        assert link.wait_registered(20)
        assert link.drops["malformed"] == malformed(said, messages.FromRouter)
        assert set(link.drops) == {"malformed"}
        socket.send_multipart([name, encode(Work(epoch, 1, "r", 5.0, True)), b"input"])
        assert link.next(20).frames == (b"input",)


def test_a_name_that_is_none_is_dropped_and_counted(router, client, workers, member):
    workers(router)
    for identity in (b"\xff\xfe", b"two words", b"x" * 200):
        member(router, "client", identity).send(encode(Alive()))
        member(router, "worker", identity).send(encode(Heartbeat(1, 1)))
    assert within(10, lambda: router.stats().dropped.get("identity", 0) == 6)
    check_service(client, "r")


@pytest.mark.parametrize(
    ("party", "message", "frames"),
    [
        ("client", Submit("r", 0, 1.0), 0),
        ("client", Cancel("r", 0), 1),
        ("client", Submit("r", 0, 1.0), messages.MOST_FRAMES + 1),
        ("worker", Heartbeat(1, 1), 1),
        ("worker", Finished(1, 1), 0),
        ("worker", Pushed(1, 1, 1), 2),
    ],
)
def test_a_message_with_frames_that_are_not_its_own_is_dropped(
    router, member, party, message, frames
):
    member(router, party).send_multipart([encode(message), *[b"x"] * frames])
    assert within(10, lambda: router.stats().dropped.get("malformed") == 1)
    assert router.stats().unfinished == 0


def test_an_input_in_many_frames_that_is_too_large_in_all_is_refused(router_of, member):
    router = router_of(max_input_bytes=1000)
    socket = member(router, "client")
    socket.send_multipart([encode(Submit("r", 0, 1.0)), *[b"x" * 600] * 2])
    assert socket.poll(5000)
    refused = messages.decode(socket.recv(), messages.ToClient)
    assert (refused.reason, refused.retryable) == ("too large", False)


def test_a_frame_too_large_for_a_socket_ends_its_connection_alone(router_of, member, workers,
                                                                  client_of):  # fmt: skip
    router = router_of(max_input_bytes=1000)
    workers(router)
    client = client_of(router)
    socket = member(router, "client")
    socket.send_multipart([encode(Submit("r", 0, 1.0)), b"x" * (2 << 20)])
    check_service(client, "r1")
    assert not socket.poll(500), "it was not even read"
    assert router.stats().unfinished == 0


def test_workers_beyond_the_limit_are_not_taken(router_of, worker, caplog):
    router = router_of(max_workers=1)
    worker(router, "encoder")
    second = worker(router, "decoder", wait=False)
    assert not second.link.wait_registered(0.5)
    assert router.stats().dropped["workers"] >= 1
    assert "decoder-0 is one more than 1" in caplog.text


def test_a_client_that_does_not_read_loses_its_own_messages_only(
    monkeypatch, router_of, workers, client_of, member
):
    monkeypatch.setattr(router_sockets, "_HIGH_WATER", 20)
    router = router_of()
    made, client = workers(router), client_of(router)
    made[2].result = lambda text: {"text": text, "long": "x" * 300_000}
    deaf = member(router, "client", b"deaf")
    deaf.rcvhwm = 1
    frames = client_frames("d")
    deaf.send_multipart([encode(Submit("d", 0, 20.0)), *frames])
    for number in range(200):
        deaf.send_multipart([encode(Submit("d", 0, 20.0)), *frames])
        if number % 50 == 0:
            check_service(client, f"r{number}")
    assert within(10, lambda: router.stats().dropped.get("unread", 0) > 0)
    check_service(client, "last")


def client_frames(text):
    from hwcore.diffusion import pack_tensors

    return [bytes(frame) for frame in pack_tensors({"text": text})]


def test_a_message_whose_handling_fails_is_counted_and_the_next_is_handled(
    router, workers, client, monkeypatch, caplog
):
    workers(router)
    real, failures = router._core.from_client, [1, 2, 3]

    def fails(*arguments):
        if failures:
            failures.pop()
            message = "out of luck"
            raise RuntimeError(message)
        real(*arguments)

    monkeypatch.setattr(router._core, "from_client", fails)
    check_service(client, "r")
    assert router.stats().dropped["error"] == 3
    assert "out of luck" in caplog.text


def test_limits_are_checked():
    for name in ("max_workers", "max_input_bytes", "max_result_bytes", "max_waiting_bytes"):
        with pytest.raises(ValueError, match=f"{name} got 0"):
            RouterConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"max_input_bytes got .*; expected at most 1073741824"):
        RouterConfig(max_input_bytes=(1 << 30) + 1)
