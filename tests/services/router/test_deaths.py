"""Processes that are killed, hang, come back, or claim a name that is taken."""

import os
import signal
import time

import pytest

from hwcore.diffusion.router import RouterClient, connection
from hwcore.errors import ArgumentTypeError, ArgumentValueError, PeerTimeoutError, RequestError

from ._peers import answer_to, port_of, within


def ask(client, name, text=None, deadline_s=30.0, **options):
    return client.submit(name, {"text": text or name}, deadline_s=deadline_s, **options)


def worker_process(child, router, role, name, options=""):
    """Start a worker in a process of its own; it says when it computes."""
    made = child(f"""
class Loud(Echo):
    def compute(self, todo):
        print("computes", flush=True)
        super().compute(todo)

echo = Loud({router.worker_address!r}, token, {role!r}, {name!r}, {options})
assert echo.link.wait_registered(20)
print("registered", flush=True)
sys.stdin.read()
""")
    assert made.line() == "registered"
    return made


# --- Workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "how"),
    [
        ("encoder", signal.SIGKILL),
        ("denoiser", signal.SIGKILL),
        ("decoder", signal.SIGKILL),
        ("denoiser", signal.SIGSTOP),
    ],
)
def test_who_computes_is_killed_or_hangs_and_another_does_it(
    role, how, router, child, worker, workers, client
):
    slow = worker_process(child, router, role, "victim", "slow_s=30")
    others = [worker(router, other) for other in ("encoder", "denoiser", "decoder")
              if other != role]  # fmt: skip
    pending = ask(client, "r")
    assert slow.line() == "computes"
    slow.process.send_signal(how)
    worker(router, role)
    assert pending.result(30)["text"] == answer_to("r")
    assert within(10, lambda: router.stats().is_settled)
    assert "victim" not in router.stats().workers
    assert all(echo.outputs == {} and echo.memory.consumed == {} for echo in others)


def test_a_worker_that_is_started_again_works_at_once(router, child, workers, client):
    """It need not be taken for dead first: its epoch is higher."""
    first = worker_process(child, router, "encoder", "e")
    first.kill()
    worker_process(child, router, "encoder", "e")
    for echo in workers_but_encoder(router, workers):
        assert echo.link.registered
    assert ask(client, "r").result(20)["text"] == answer_to("r")


def workers_but_encoder(router, workers):
    made = workers(router)
    made[0].close()
    return made[1:]


def test_an_owner_that_hangs_is_found_out_by_the_time_its_job_takes(
    router_of, worker, workers, client_of
):
    router = router_of(job_timeout_s=0.5)
    hung = worker(router, "encoder", name="hung", hangs=True)
    client = client_of(router)
    pending = ask(client, "r")
    assert within(10, lambda: router.stats().workers["hung"].jobs == 1)
    workers(router)
    assert pending.result(20)["text"] == answer_to("r")
    assert router.stats().workers["hung"].epoch, "its heartbeats went on"
    hung.hangs = False
    assert within(10, lambda: router.stats().is_settled)
    assert hung.outputs == {}


# --- Names ----------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    """Connections are made anew after half a second without a word."""
    monkeypatch.setattr(connection, "_SILENT_S", 0.5)


def test_a_second_worker_of_a_name_waits_until_the_first_has_gone(
    router, worker, workers, client, impatient, caplog
):
    made = workers(router)
    epoch = router.stats().workers["encoder-0"].epoch
    second = worker(router, "encoder", wait=False)
    assert not second.link.wait_registered(1.5)
    for number in range(5):
        assert ask(client, f"r{number}").result(20)["text"] == answer_to(f"r{number}")
    assert (made[0].computed, second.computed) == (5, 0)
    assert router.stats().workers["encoder-0"].epoch == epoch, "the first was not disturbed"
    assert made[0].restarts == 0
    assert "or another worker has this name" in caplog.text
    made[0].close()
    assert second.link.wait_registered(20)
    assert ask(client, "r9").result(20)["text"] == answer_to("r9")
    assert second.computed == 1


def test_a_connection_on_which_nothing_happens_stays(router, workers, client, impatient, caplog):
    """The router answers every heartbeat: who hears nothing has lost it."""
    made = workers(router)
    sockets = [echo.link._connection._socket for echo in made] + [client._connection._socket]
    time.sleep(1.5)
    assert "connecting anew" not in caplog.text
    assert sockets == [
        *(echo.link._connection._socket for echo in made), client._connection._socket
    ]  # fmt: skip


def test_a_second_client_of_a_name_is_not_heard(router, token, client_of, workers):
    workers(router)
    first = client_of(router, client_id="me")
    with pytest.raises(PeerTimeoutError):
        RouterClient(router.client_address, token, client_id="me", connect_timeout_s=0.5)
    assert ask(first, "r").result(20)["text"] == answer_to("r")


def test_a_worker_whose_clock_was_set_back_is_told_the_epoch_to_begin_above(
    router, worker, workers, client, monkeypatch
):
    made = workers(router)
    before = router.stats().workers["encoder-0"].epoch
    made[0].close()
    monkeypatch.setattr(time, "time_ns", lambda: 1000)
    again = worker(router, "encoder")
    assert router.stats().workers["encoder-0"].epoch > before
    assert again.restarts == 1
    assert ask(client, "r").result(20)["text"] == answer_to("r")


@pytest.mark.parametrize("name", ["", "two words", "x" * 129, "é", "\x00"])
def test_a_name_that_is_none_is_an_error(router, worker, token, name):
    with pytest.raises(ArgumentValueError, match="the worker's name got"):
        worker(router, "encoder", name=name or "\n")
    with pytest.raises(ArgumentValueError, match="the client's name got"):
        RouterClient(router.client_address, token, client_id=name)
    with pytest.raises(ArgumentTypeError, match="the client's name got 7"):
        RouterClient(router.client_address, token, client_id=7)


# --- Clients --------------------------------------------------------------------------------------


def client_process(child, router, code):
    return child(f"""
client = RouterClient({router.client_address!r}, token, client_id="me")
pending = client.submit("r", {{"text": "r"}}, deadline_s=60)
{code}
""")


def test_a_killed_clients_requests_end_and_what_they_hold_is_free(router, child, workers, client):
    made = workers(router, slow_s=0.5)
    gone = client_process(child, router, "print('asked', flush=True)\nsys.stdin.read()")
    gone.line()
    assert within(10, lambda: router.stats().unfinished == 1)
    gone.kill()
    assert within(10, lambda: router.stats().is_settled)
    assert router.stats().clients == 1, "the other one"
    assert within(10, lambda: all(echo.outputs == {} for echo in made))
    assert sum(echo.computed for echo in made) < 3
    assert ask(client, "r9").result(20)["text"] == answer_to("r9")


def test_a_client_that_hangs_counts_as_gone(router, child):
    hung = client_process(child, router, "print('asked', flush=True)\nsys.stdin.read()")
    hung.line()
    assert within(10, lambda: router.stats().unfinished == 1)
    hung.process.send_signal(signal.SIGSTOP)
    assert within(10, lambda: router.stats().unfinished == 0)


def test_a_client_that_comes_back_under_its_id_gets_its_result(router, child, workers, client_of):
    made = workers(router)
    gone = client_process(
        child, router, "pending.result()\nprint('had', flush=True)\nsys.stdin.read()"
    )
    assert gone.line() == "had"
    gone.kill()
    again = client_of(router, client_id="me")
    assert ask(again, "r").result(20)["text"] == answer_to("r")
    assert [echo.computed for echo in made] == [1, 1, 1], "it was not computed again"


# --- The router -----------------------------------------------------------------------------------


def test_a_killed_router_that_is_started_again_serves_what_was_asked(
    other_router, worker, client_of
):
    first, clients, workers = other_router()
    made = [worker(workers, role, slow_s=0.1) for role in ("encoder", "denoiser", "decoder")]
    client = client_of(clients)
    pendings = [ask(client, f"r{number}") for number in range(8)]
    time.sleep(0.3)  # some are at each of the roles
    first.kill()
    assert not all(pending.done for pending in pendings)
    other_router(port_of(clients), port_of(workers))
    for pending in pendings:
        assert pending.result(30)["text"] == answer_to(pending.request_id)
    assert all(echo.restarts >= 1 for echo in made), "with new pools: old ones may be written to"
    assert within(10, lambda: all(echo.outputs == {} for echo in made))


def test_a_killed_router_that_stays_away_means_an_error_at_the_deadline(
    other_router, client_of, impatient, caplog
):
    first, clients, _ = other_router()
    client = client_of(clients)
    pending = ask(client, "r", deadline_s=1.5)
    first.kill()
    with pytest.raises(RequestError, match="no answer by its deadline") as caught:
        pending.result(20)
    assert (caught.value.reason, caught.value.retryable) == ("deadline", True)
    assert f"no word from the router at {clients}" in caplog.text


def test_a_router_that_hangs_for_a_while_loses_nothing(other_router, worker, client_of):
    process, clients, workers = other_router()
    for role in ("encoder", "denoiser", "decoder"):
        worker(workers, role, slow_s=0.1)
    client = client_of(clients)
    pendings = [ask(client, f"r{number}") for number in range(5)]
    os.kill(process.process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.process.pid, signal.SIGCONT)
    for pending in pendings:
        assert pending.result(30)["text"] == answer_to(pending.request_id)


def test_a_signals_handler_may_close_the_router(child, token):
    """As SIGTERM does it in a process that serves forever."""
    made = child("""
import signal
router = Router(token)
signal.signal(signal.SIGTERM, lambda *_: router.close())
print("serving", flush=True)
router.serve_forever()
print("ended", flush=True)
""")
    assert made.line() == "serving"
    time.sleep(0.2)
    made.process.terminate()
    assert made.line() == "ended"
    assert made.process.wait(10) == 0
