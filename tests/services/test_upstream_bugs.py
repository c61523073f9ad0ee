"""What upstream's disaggregation did wrong at its sockets and in its loops, by the facts' numbers.

Numbers 1 and 5 to 14 concern memory and manifests: tests/diffusion/test_upstream_bugs.py,
test_transfer_bugs.py. Deaths at every point: test_survival.py. Garbage: router/test_faults.py.
"""

import ast
import pathlib
import pickle

import pytest
import torch
import zmq

import hwcore.diffusion
from hwcore.diffusion.messages import Submit, encode
from hwcore.diffusion.roles import PIPELINE
from hwcore.diffusion.router.security import Security
from hwcore.errors import RequestError, RequestTimeoutError
from tests.diffusion.serving import _roles
from tests.diffusion.serving.test_scheduler import Gate, until_settled


@pytest.fixture
def peer():
    """Connect as one that has the token and sends what it likes."""
    with zmq.Context() as context:
        sockets = []

        def connect(served, party):
            socket = context.socket(zmq.DEALER)
            sockets.append(socket)
            socket.identity, socket.linger = b"peer", 0
            Security(served.token, "test").join(socket, party)
            socket.connect(getattr(served.router, f"{party}_address"))
            return socket

        yield connect
        for socket in sockets:
            socket.close(0)


@pytest.mark.parametrize("party", ["client", "worker"])
def test_02_malformed_frames_end_nothing(serve, peer, party):
    served, socket = serve(), None
    socket = peer(served, party)
    for frames in ([b"[]"], [b'{"msg_type": "staged"}'], [b'{"request_id": []}'], [b"", b"", b""]):
        socket.send_multipart(frames)
    assert _roles.until(lambda: sum(served.router.stats().dropped.values()) >= 4)
    assert _roles.same(served.ask(1).result(), 1)


def test_03_a_pickle_from_a_peer_is_never_opened(serve, peer, tmp_path):
    class Opened:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "opened",)

    served = serve()
    socket = peer(served, "client")
    evil = pickle.dumps(Opened())
    socket.send_multipart([evil])
    socket.send_multipart([encode(Submit("evil", 0, 5.0)), evil])  # as a request's input
    assert _roles.until(lambda: served.router.stats().dropped.get("malformed", 0) >= 1)
    assert _roles.same(served.ask(1).result(), 1)
    assert not (tmp_path / "opened").exists()


def test_03_nothing_in_the_package_can_open_one():
    found = []
    for path in pathlib.Path(hwcore.diffusion.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, it) for it in names if it in ("pickle", "cloudpickle", "dill")]
            if isinstance(node, ast.Attribute) and node.attr.endswith("object_list"):
                found.append((path.name, node.attr))  # of torch.distributed, which pickles
    assert found == []


class Makes(_roles.Role):
    """Hands on what it is told."""

    def __init__(self, role, made):
        super().__init__(role)
        self.made = made

    def disagg_compute(self, request):
        wanted = request.extra.get("made")
        request = super().disagg_compute(request)
        if wanted:
            request.fields["more"] = self.made[wanted]()
        return request


MADE = {
    "an object": object,
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a meta tensor": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.parametrize("what", MADE)
def test_04_what_cannot_be_staged_is_told_at_once_and_the_worker_goes_on(serve, what):
    served = serve([Makes(PIPELINE[0], MADE), *map(_roles.Role, PIPELINE[1:])])
    for _ in range(4):  # three in a row ended upstream's worker
        with pytest.raises(RequestError, match="size_of") as error:
            served.ask(1, made=what).result()
        assert not error.value.retryable
    assert _roles.same(served.ask(1).result(), 1)
    until_settled(served)


def test_04_outputs_of_no_tensors_and_of_0_dim_tensors_are_served(serve):
    made = {"nothing": lambda: None, "0-dim": lambda: torch.tensor(1.5)}
    served = serve([Makes(PIPELINE[0], made), *map(_roles.Role, PIPELINE[1:])])
    for what in [*made] * 4:
        assert _roles.same(served.ask(1, made=what).result(), 1)
    for size in (0, 0, 0, 0):
        assert _roles.same(served.ask(1, size).result(), 1, size)


def test_08_a_request_that_times_out_leaves_no_memory_taken_on_any_worker(serve):
    gate = Gate(PIPELINE[2])
    served = serve([*map(_roles.Role, PIPELINE[:2]), gate])
    pending = [served.ask(number, deadline_s=0.6) for number in range(6)]
    for one in pending:
        with pytest.raises(RequestTimeoutError):
            one.result()
    gate.open.set()
    until_settled(served)
    assert _roles.same(served.ask(1).result(), 1)


def test_h_a_receiver_without_room_is_waited_for(serve):
    gate = Gate(PIPELINE[2])
    served = serve([*map(_roles.Role, PIPELINE[:2]), gate], pool_bytes=1 << 18, slot_bytes=())
    pending = [served.ask(number, 40_000) for number in range(5)]  # 160 kB each
    assert gate.inside.acquire(timeout=10)
    gate.open.set()
    for number, one in enumerate(pending):
        assert _roles.same(one.result(), number, 40_000)
