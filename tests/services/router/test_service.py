"""Requests over real sockets: what a client sees, and what is left afterwards."""

import os
import threading
import time

import pytest
import torch

from hwcore.diffusion import unpack_tensors
from hwcore.diffusion.roles import PIPELINE, RoleType
from hwcore.diffusion.router import Router, RouterClient
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CapabilityError,
    ClosedError,
    PeerTimeoutError,
    RequestError,
    RequestTimeoutError,
)

from ._peers import answer_to, within


def ask(client, name, text=None, deadline_s=20.0, **options):
    return client.submit(name, {"text": text or name}, deadline_s=deadline_s, **options)


def refusal(pending):
    with pytest.raises(RequestError) as caught:
        pending.result(20)
    return caught.value


def test_a_request_passes_every_role_and_comes_back(router, workers, client):
    workers(router)
    assert ask(client, "r", "a cat").result() == {"text": answer_to("a cat")}


def test_many_at_once_each_get_their_own(router, workers, client_of):
    made = workers(router)
    answers = {}

    def serve(number):
        client = client_of(router)  # which stays: nothing is dropped for one that has left
        pendings = [ask(client, f"{number}-{n}") for n in range(50)]
        answers.update({p.request_id: p.result(20)["text"] for p in pendings})

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {f"{a}-{b}": answer_to(f"{a}-{b}") for a in range(8) for b in range(50)}
    assert [echo.computed for echo in made] == [400] * 3
    assert router.stats().dropped == {}


def test_one_client_serves_many_threads(router, workers, client):
    workers(router)
    answers = {}

    def serve(number):
        for n in range(20):
            answers[number, n] = ask(client, f"{number}-{n}").result(20)["text"]

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {(a, b): answer_to(f"{a}-{b}") for a in range(8) for b in range(20)}


def test_input_and_result_are_trees_of_tensors(router, workers, client):
    image, seen = torch.arange(300_000, dtype=torch.float32), []
    encoder, _, decoder = workers(router)
    compute = encoder.compute
    encoder.compute = lambda todo: (seen.append(unpack_tensors(todo.frames)), compute(todo))
    decoder.result = lambda text: {"pixels": image * 2, "text": text}
    result = client.submit("r", {"text": "x", "image": [image, None]}, deadline_s=20).result(20)
    assert torch.equal(seen[0]["image"][0], image)
    assert seen[0]["image"][1] is None
    assert torch.equal(result["pixels"], image * 2)
    assert result["text"] == answer_to("x")


def test_progress_is_told_role_by_role(router, workers, client):
    workers(router)
    steps = []
    ask(client, "r", on_progress=lambda role, number: steps.append((role, number))).result(20)
    assert steps == [(role, 1) for role in PIPELINE]


def test_a_progress_function_that_raises_harms_nothing(router, workers, client, caplog):
    workers(router)
    assert ask(client, "r", on_progress=lambda *_: 1 / 0).result(20)["text"] == answer_to("r")
    assert "on_progress of 'r' failed" in caplog.text


def test_an_image_encoder_is_skipped_where_there_is_no_image(router_of, worker, client_of):
    pipeline = (RoleType.IMAGE_ENCODER, *PIPELINE)
    router = router_of(pipeline=pipeline)
    for role in pipeline:
        worker(router, role)
    client = client_of(router)
    assert ask(client, "a", skip=[RoleType.IMAGE_ENCODER]).result(20)["text"] == answer_to("a")
    assert ask(client, "b").result(20)["text"] == answer_to("b image_encoder")


def test_work_goes_round_the_workers_of_a_role(router, worker, workers, client):
    made = [*workers(router), worker(router, "denoiser", name="denoiser-1")]
    for number in range(20):
        ask(client, f"r{number}").result(20)
    assert [echo.computed for echo in made] == [20, 10, 20, 10]


# --- Refusals -------------------------------------------------------------------------------------


def test_a_router_with_enough_to_do_says_so(router_of, client_of):
    client = client_of(router_of(max_requests=2))
    waiting = [ask(client, f"r{number}") for number in range(2)]
    error = refusal(ask(client, "r2"))
    assert (error.reason, error.retryable, error.request_id) == ("busy", True, "r2")
    assert not any(pending.done for pending in waiting)


def test_a_router_with_enough_input_to_hold_says_so(router_of, client_of):
    client = client_of(router_of(max_waiting_bytes=3000))
    ask(client, "r0", "x" * 2000)
    assert refusal(ask(client, "r1", "x" * 2000)).reason == "busy"


def test_an_id_that_another_client_waits_for_is_refused(router, client, client_of):
    first = ask(client, "r")
    error = refusal(ask(client_of(router), "r"))
    assert (error.reason, error.retryable) == ("duplicate", False)
    assert not first.done


def test_an_id_that_the_client_itself_waits_for_is_an_error(router, client):
    ask(client, "r")
    with pytest.raises(ArgumentValueError, match="request_id got 'r'"):
        ask(client, "r")


def test_the_same_request_again_is_not_computed_again(router, workers, client):
    made = workers(router)
    ask(client, "r").result(20)
    assert ask(client, "r").result(20)["text"] == answer_to("r")
    assert [echo.computed for echo in made] == [1, 1, 1]
    assert ask(client, "r", attempt=1).result(20)["text"] == answer_to("r")
    assert [echo.computed for echo in made] == [2, 2, 2]


def test_what_is_cancelled_ends_and_leaves_nothing(router, workers, client):
    made = workers(router, slow_s=0.2)
    pendings = [ask(client, f"r{number}") for number in range(4)]
    time.sleep(0.3)
    for pending in pendings:
        pending.cancel()
    for pending in pendings:
        error = refusal(pending)
        assert (error.reason, error.retryable) == ("cancelled", False)
    assert within(10, lambda: router.stats().is_settled)
    assert within(10, lambda: all(echo.outputs == {} for echo in made))
    assert all(echo.memory.consumed == {} for echo in made)
    assert ask(client, "r9").result(20)["text"] == answer_to("r9"), "and others are served"


def test_without_an_answer_by_the_deadline_there_is_an_error(router, client):
    error = refusal(ask(client, "r", deadline_s=0.3))
    assert isinstance(error, RequestTimeoutError)
    assert isinstance(error, TimeoutError)
    assert (error.reason, error.retryable) == ("deadline", True)
    assert "it waits for a worker of its first role" in str(error)


def test_waiting_may_end_before_the_request_does(router, client, workers):
    pending = ask(client, "r")
    with pytest.raises(PeerTimeoutError, match=r"'r' got no answer in 0\.1 s"):
        pending.result(0.1)
    workers(router)
    assert pending.result(20)["text"] == answer_to("r")


def test_an_input_that_the_router_does_not_take_is_an_error_that_names_both_sizes(
    router_of, client_of
):
    client = client_of(router_of(max_input_bytes=1000))
    with pytest.raises(ArgumentValueError, match=r"got '2\d\d\d bytes .* at most 1000 bytes"):
        ask(client, "r", "x" * 2000)


def test_a_result_that_the_router_does_not_take_fails_its_request_alone(
    router_of, workers, client_of
):
    router = router_of(max_result_bytes=1000)
    made, client = workers(router), client_of(router)
    error = refusal(ask(client, "r", "x" * 2000))
    assert (error.reason, error.retryable) == ("failed", False)
    assert "and the router takes 1000 in 1" in str(error)
    assert ask(client, "r1").result(20)["text"] == answer_to("r1")
    assert [echo.link.registered for echo in made] == [True] * 3


def test_an_output_that_no_pool_holds_fails_its_request(router, worker, client):
    worker(router, "encoder")
    worker(router, "denoiser", pool_bytes=100, sizes=())
    assert refusal(ask(client, "r", "x" * 200)).reason == "too large"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"deadline_s": 0}, ArgumentValueError),
        ({"deadline_s": "1"}, ArgumentTypeError),
        ({"deadline_s": float("nan")}, ArgumentValueError),
        ({"attempt": -1}, ArgumentValueError),
        ({"skip": ["decoder"]}, ArgumentTypeError),
        ({"on_progress": 1}, ArgumentTypeError),
    ],
)
def test_what_cannot_be_asked_is_an_error_at_once(router, client, options, error):
    with pytest.raises(error):
        client.submit("r", {}, **{"deadline_s": 1.0} | options)
    assert router.stats().unfinished == 0


@pytest.mark.parametrize("name", ["", "x" * 257, "\ud800"])
def test_an_id_that_cannot_be_sent_is_an_error_at_once(router, client, name):
    with pytest.raises(ArgumentValueError):
        client.submit(name, {}, deadline_s=1.0)


# --- The end --------------------------------------------------------------------------------------


def test_a_router_that_drains_ends_what_it_has(router, workers, client):
    workers(router, slow_s=0.1)
    first = ask(client, "r0")
    assert within(10, lambda: router.stats().unfinished == 1)
    router.drain()
    assert refusal(ask(client, "r1")).reason == "draining"
    assert first.result(20)["text"] == answer_to("r0")
    assert router.stats().draining
    assert within(10, lambda: router.stats().is_settled)


def test_a_worker_that_drains_gets_nothing_new(router, workers, worker, client):
    first = worker(router, "denoiser", name="leaving")
    workers(router)
    router.drain_worker("leaving")
    for number in range(4):
        ask(client, f"r{number}").result(20)
    assert first.computed == 0
    assert first.link.draining
    assert router.stats().workers["leaving"].draining


def test_a_worker_that_is_not_there_cannot_be_drained(router):
    with pytest.raises(ArgumentValueError, match="name got 'nobody'"):
        router.drain_worker("nobody")


def test_a_router_that_ends_says_so_to_who_waits(router, client):
    pending = ask(client, "r")
    assert within(10, lambda: router.stats().unfinished == 1)
    router.close()
    error = refusal(pending)
    assert (error.reason, error.retryable) == ("draining", True)


def test_a_client_that_ends_cancels_what_it_waits_for(router_of, client_of):
    router = router_of(dead_after_s=60.0)  # it is told, and need not find out
    client = client_of(router)
    pending = ask(client, "r")
    assert within(10, lambda: router.stats().unfinished == 1)
    client.close()
    with pytest.raises(ClosedError, match="closed before request 'r' was done"):
        pending.result(20)
    assert within(10, lambda: router.stats().unfinished == 0)


def test_after_the_end_everything_is_an_error(router, workers, client):
    made = workers(router)
    for echo in made:
        echo.close()
    client.close()
    router.close()
    for call in (
        lambda: ask(client, "r"),
        router.stats,
        router.drain,
        router.start,
        lambda: made[0].link.next(1),
        lambda: made[0].link.computed(1, 1),
    ):
        with pytest.raises(ClosedError):
            call()
    for again in (client.close, router.close, made[0].link.close):
        again()


def test_nothing_is_left_open(token, router_of, workers, client_of):
    def files():
        return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{fd}")}  # fmt: skip

    before = len(files())
    router = router_of(metrics_port=0)
    made, client = workers(router), client_of(router)
    ask(client, "r").result(20)
    for echo in made:
        echo.close()
    client.close()
    router.close()
    assert within(5, lambda: len(files()) <= before), files()


def test_who_serves_forever_goes_on_once_another_thread_closes_the_router(token):
    router, log, may_end = Router(token), [], threading.Event()

    def serve():
        router.serve_forever()
        log.append("served")
        may_end.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    assert within(5, lambda: router.stats() and router._loop.is_running)
    router.close()
    assert within(5, lambda: log == ["served"])
    assert thread.is_alive(), "close() waits for the service, not for the thread that gave it"
    may_end.set()
    thread.join(10)


def test_a_router_is_served_once(router):
    router.start()
    assert sum("hwcore-router" in thread.name for thread in threading.enumerate()) == 1
    with pytest.raises(CapabilityError, match="it is served already"):
        router.serve_forever()


def test_a_router_that_was_never_started_closes(token):
    router = Router(token)
    assert router.stats().unfinished == 0
    router.close()


def test_a_server_that_is_not_there_is_named(token):
    with pytest.raises(PeerTimeoutError, match=r"the router at tcp://127\.0\.0\.1:9 did not answ"):
        RouterClient("tcp://127.0.0.1:9", token, connect_timeout_s=0.3)


@pytest.mark.parametrize(
    ("address", "error"),
    [("nowhere", ArgumentValueError), ("", ArgumentValueError), (1, ArgumentTypeError)],
)
def test_what_is_no_address_is_an_error(token, address, error):
    with pytest.raises(error, match="address got"):
        RouterClient(address, token)


def test_a_port_that_is_taken_is_named(token, router):
    port = int(router.client_address.rpartition(":")[2])
    with pytest.raises(OSError, match=f"client_port got {port}"):
        Router(token, client_port=port)


def test_an_idle_router_does_not_spin(router, workers, client):
    workers(router)
    rounds = []
    count = router._loop._round

    def counted(due):
        rounds.append(due)
        return count(due)

    router._loop._round = counted
    time.sleep(1.0)
    # Ten heartbeats each of three workers and a client, what follows from them, and the metrics.
    assert len(rounds) < 150
