"""Who may talk to a router, and what happens to those who may not."""

import sys
import textwrap

import pytest
import zmq

from hwcore.diffusion.engines import Token
from hwcore.diffusion.messages import Alive, Register, encode
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.router import Router, RouterClient, WorkerLink, security
from hwcore.errors import ArgumentTypeError, ArgumentValueError, CapabilityError, PeerTimeoutError

from ._peers import Memory, answer_to, within

ALIVE = encode(Alive([("r", 0)]))
REGISTER = encode(Register(RoleType.ENCODER, 1, "a", "e" * 16, 1, 100))


@pytest.fixture
def intruder(stack):
    """Connect a socket with keys of the caller's choice."""
    context = stack.enter_context(zmq.Context())

    def connect(address, prepare):
        socket = context.socket(zmq.DEALER)
        socket.linger, socket.identity = 0, b"intruder"
        prepare(socket)
        socket.connect(address)
        stack.callback(socket.close)
        return socket

    return connect


def answered(socket, frame, seconds=0.7):
    """Say something, several times; say whether anything came back."""
    for _ in range(5):
        socket.send(frame)
    return bool(socket.poll(int(seconds * 1e3)))


def keys_of(token, who, party):
    return security.Security(token, "test")._keys(who, party)


def own_keys(token, party):
    """A third party that learnt the router's public key, with keys of its own."""

    def prepare(socket):
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = keys_of(token, "router", party).public

    return prepare


def test_who_has_the_token_is_heard(router, token, intruder):
    for party, address, frame in (
        ("client", router.client_address, ALIVE),
        ("worker", router.worker_address, REGISTER),
    ):
        joined = security.Security(token, "test")
        assert answered(intruder(address, lambda s, j=joined, p=party: j.join(s, p)), frame)


@pytest.mark.parametrize("party", ["client", "worker"])
def test_who_has_other_keys_gets_nowhere_though_it_knows_the_routers(
    party, router, token, intruder
):
    address = getattr(router, f"{party}_address")
    frame = ALIVE if party == "client" else REGISTER
    assert not answered(intruder(address, own_keys(token, party)), frame)
    stats = router.stats()
    assert (stats.clients, stats.workers) == (0, {})
    assert stats.dropped["token"] >= 1


def test_a_client_is_no_worker(router, token, intruder):
    def prepare(socket):
        keys = keys_of(token, "client", "client")
        socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
        socket.curve_serverkey = keys_of(token, "router", "worker").public

    assert not answered(intruder(router.worker_address, prepare), REGISTER)
    assert router.stats().dropped["token"] >= 1


@pytest.mark.parametrize("party", ["client", "worker"])
def test_who_has_no_keys_gets_nowhere(party, router, intruder):
    address = getattr(router, f"{party}_address")
    frame = ALIVE if party == "client" else REGISTER
    assert not answered(intruder(address, lambda socket: None), frame)
    assert within(5, lambda: router.stats().dropped.get("handshake", 0) >= 1)
    assert router.stats().workers == {}


def test_who_has_another_token_gets_an_error_that_says_so(router):
    with pytest.raises(PeerTimeoutError, match="both have the same token"):
        RouterClient(router.client_address, Token.create(), connect_timeout_s=0.5)
    link = WorkerLink(
        router.worker_address,
        Token.create(),
        name="w",
        role=RoleType.ENCODER,
        memory=Memory(),
        capacity=1,
    )
    assert not link.wait_registered(0.5)
    link.close()
    assert router.stats().workers == {}
    assert router.stats().dropped["handshake"] >= 1


def test_what_is_said_is_not_to_be_read_on_the_way(token, stack, router):
    """A wire-tap between client and router sees neither input nor id."""
    import socket as sockets
    import threading

    listener = stack.enter_context(sockets.create_server(("127.0.0.1", 0)))
    port = int(router.client_address.rpartition(":")[2])
    seen = bytearray()

    def pump(source, target):
        while data := source.recv(65536):
            seen.extend(data)
            target.sendall(data)

    def tap():
        near, _ = listener.accept()
        far = sockets.create_connection(("127.0.0.1", port))
        back = threading.Thread(target=quiet, args=(pump, far, near), daemon=True)
        back.start()
        quiet(pump, near, far)
        far.close()
        back.join(5)
        near.close()

    thread = threading.Thread(target=tap, daemon=True)
    thread.start()
    tapped = RouterClient(f"tcp://127.0.0.1:{listener.getsockname()[1]}", token)
    tapped.submit("request-id", {"text": "secret prompt"}, deadline_s=10)
    assert within(5, lambda: router.stats().unfinished == 1)
    tapped.close()
    thread.join(5)
    assert len(seen) > 500
    assert b"secret prompt" not in seen
    assert b"request-id" not in seen


def quiet(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        return


def test_without_authentication_everything_works_and_the_log_says_so(
    router_of, workers, client_of, caplog
):
    off = Token.off()
    router = router_of(token=off)
    workers(router, token=off)
    client = client_of(router, token=off)
    assert client.submit("r", {"text": "r"}, deadline_s=20).result(20)["text"] == answer_to("r")
    for who in ("Router", "RouterClient", "WorkerLink"):
        assert f"{who}: opened with Token.off(): whoever reaches it may take part" in caplog.text


def test_keys_are_the_same_for_a_token_and_differ_for_all_else():
    one, two = Token(b"a" * 32), Token(b"b" * 32)
    parties = [("router", "client"), ("router", "worker"), ("client", "client"),
               ("worker", "worker")]  # fmt: skip
    made = {keys_of(token, *party).public for token in (one, two) for party in parties}
    assert len(made) == 8
    assert keys_of(one, "client", "client") == keys_of(Token(b"a" * 32), "client", "client")
    assert keys_of(one, "client", "client").secret.decode() not in repr(
        keys_of(one, "client", "client")
    )


def test_a_libzmq_without_encryption_is_an_error(monkeypatch, token):
    monkeypatch.setattr(security.zmq, "has", lambda name: name != "curve")
    with pytest.raises(CapabilityError, match="got no CURVE"):
        Router(token)
    Router(Token.off()).close()


def test_a_token_that_is_none_is_an_error_that_does_not_show_it():
    with pytest.raises(ArgumentTypeError) as caught:
        Router(b"a secret of sixteen bytes")
    assert "secret of" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "error"),
    [
        ("0.0.0.0", ArgumentValueError),
        ("192.0.2.1", ArgumentValueError),
        ("localhost", ArgumentValueError),
        (None, ArgumentTypeError),
    ],
)
def test_other_machines_are_let_in_only_where_that_is_said(token, host, error):
    with pytest.raises(error, match="host got"):
        Router(token, host=host)


def test_all_interfaces_are_bound_where_that_is_said(token):
    with Router(token, host="0.0.0.0", allow_remote=True) as router:
        assert router.client_address.startswith("tcp://0.0.0.0:")


def test_without_its_libraries_the_router_names_what_to_install(processes):
    code = """
        import sys
        sys.modules["zmq"] = None
        import hwcore.diffusion, hwcore.diffusion.router
        from hwcore.diffusion.router import RouterCore, WorkerCore
        for name in ("Router", "RouterClient", "WorkerLink"):
            try:
                getattr(hwcore.diffusion.router, name)
            except Exception as error:
                print(type(error).__name__, error)
    """
    lines = processes.run(textwrap.dedent(code)).output
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("CapabilityError hwcore.diffusion.router: `")
        assert line.endswith("Run pip install 'hwcore[diffusion]'.")
    assert "zmq" in sys.modules
