"""A worker's way to its router, as its owner sees it."""

import threading
import time

import pytest

from hwcore.diffusion import pack_tensors
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.router import WorkerLink
from hwcore.diffusion.router.todo import Compute, Drop, Transfer
from hwcore.errors import ArgumentTypeError, ArgumentValueError, ClosedError, RequestError

from ._peers import Memory, answer_to, within


@pytest.fixture
def link_of(stack, token):
    """Open a link whose owner is the test."""

    def open_one(router, role="encoder", name="w", memory=None, capacity=4, sizes=()):
        return stack.enter_context(
            WorkerLink(
                router.worker_address,
                token,
                name=name,
                role=RoleType(role),
                memory=memory or Memory(),
                capacity=capacity,
                sizes=sizes,
            )
        )

    return open_one


def ask(client, name, **options):
    return client.submit(name, {"text": name}, deadline_s=20, **options)


def test_work_is_to_be_computed_then_pushed_then_dropped(router, worker, link_of, client):
    target = worker(router, "denoiser")
    worker(router, "decoder")
    link = link_of(router)
    assert link.wait_registered(10)
    pending = ask(client, "r")
    compute = link.next(10)
    assert isinstance(compute, Compute)
    assert (compute.request_id, compute.slot, compute.last) == ("r", None, False)
    assert list(compute.frames) == [bytes(frame) for frame in pack_tensors({"text": "r"})]
    assert 15 < compute.remaining_s <= 20
    link.computed(compute.job, 9)
    transfer = link.next(10)
    assert isinstance(transfer, Transfer)
    assert (transfer.job, transfer.address) == (compute.job, target.memory.address)
    link.pushed(transfer.job, transfer.turn, [b"r encoder"])
    assert link.next(10) == Drop(compute.job)
    link.dropped(compute.job)
    assert pending.result(20)["text"] == answer_to("r")


def test_there_may_be_nothing_to_do(router, link_of):
    link = link_of(router)
    assert link.wait_registered(10)
    assert link.next(0.01) is None


def test_a_failure_that_another_may_do_better_is_tried_by_another(router, workers, link_of, client):
    link = link_of(router)
    assert link.wait_registered(10)
    pending = ask(client, "r")
    job = link.next(10).job
    workers(router)
    link.failed(job, "out of memory", retryable=True)
    assert pending.result(20)["text"] == answer_to("r")


def test_a_failure_for_good_is_told_to_the_client_whatever_its_text(router, link_of, client):
    link = link_of(router)
    assert link.wait_registered(10)
    pending = ask(client, "r")
    link.failed(link.next(10).job, "no prompt: \udcff" + "x" * 10_000, retryable=False)
    with pytest.raises(RequestError, match=r"no prompt: \?xxx") as caught:
        pending.result(20)
    assert (caught.value.reason, caught.value.retryable) == ("failed", False)


def test_a_push_that_failed_goes_elsewhere(router, worker, link_of, client):
    for name in ("denoiser-0", "denoiser-1"):
        worker(router, "denoiser", name=name)
    worker(router, "decoder")
    link = link_of(router)
    assert link.wait_registered(10)
    pending = ask(client, "r")
    job = link.next(10).job
    link.computed(job, 9)
    first = link.next(10)
    link.push_failed(job, first.turn, "the peer is gone")
    second = link.next(10)
    assert second.address != first.address
    link.pushed(job, second.turn, [b"r encoder"])
    assert pending.result(20)["text"] == answer_to("r")


def test_a_manifest_that_is_too_large_is_named(router_of, worker, link_of, client_of):
    router = router_of(max_rounds=1)
    client = client_of(router)
    worker(router, "denoiser")
    link = link_of(router)
    assert link.wait_registered(10)
    pending = ask(client, "r")
    job = link.next(10).job
    link.computed(job, 9)
    while not pending.done:
        todo = link.next(0.1)
        if isinstance(todo, Transfer):
            link.pushed(job, todo.turn, [bytes(2 << 20)])
    with pytest.raises(RequestError, match="the manifest takes 2097152 bytes in 1 frames"):
        pending.result(20)


def test_memory_that_has_become_free_is_granted_where_it_is_wanted(
    router_of, worker, link_of, client_of
):
    router = router_of(resend_after_s=60.0, heartbeat_s=25.0, dead_after_s=60.0)
    worker(router, "encoder")
    memory, client = Memory(100), client_of(router)
    link = link_of(router, "denoiser", memory=memory)
    assert link.wait_registered(10)
    held = memory.grant(100)  # by something else
    assert memory.consume(held)
    ask(client, "r")
    assert link.next(0.3) is None
    memory.done(held)
    link.memory_freed()
    assert link.next(10).slot.size_bytes == len("r encoder"), "at once, not at the next heartbeat"


def test_heartbeats_go_on_whatever_the_owner_does(router, link_of):
    link = link_of(router)
    assert link.wait_registered(10)
    time.sleep(1.5)  # more than twice the time after which a silent one is dead
    assert "w" in router.stats().workers
    assert link.registered


def test_who_waits_for_work_is_woken_by_the_end(router, link_of):
    link, seen = link_of(router), []

    def wait():
        try:
            link.next(None)
        except ClosedError as error:
            seen.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    link.close()
    for thread in threads:
        thread.join(10)
    assert len(seen) == 3


def test_slots_are_asked_for_in_one_thread(router, workers, link_of, client):
    threads = set()

    class Watched(Memory):
        def grant(self, size_bytes):
            threads.add(threading.current_thread())
            return super().grant(size_bytes)

        def granted(self):
            threads.add(threading.current_thread())
            return super().granted()

    link = link_of(router, memory=Watched(), sizes=(10,))
    assert link.wait_registered(10)
    link.memory_freed()
    assert within(5, lambda: router.stats().workers["w"].free_slots == 1)
    assert [thread.name for thread in threads] == ["hwcore-worker-w"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"capacity": 0}, ArgumentValueError),
        ({"capacity": 1.0}, ArgumentTypeError),
        ({"capacity": 1 << 20}, ArgumentValueError),
        ({"sizes": (-1,)}, ArgumentValueError),
        ({"role": "encoder"}, ArgumentTypeError),
        ({"router_address": "nowhere"}, ArgumentValueError),
    ],
)
def test_what_cannot_be_a_worker_is_an_error(router, token, options, error):
    given = {"router_address": router.worker_address, "role": RoleType.ENCODER, "capacity": 1}
    given |= options
    with pytest.raises(error):
        WorkerLink(given.pop("router_address"), token, name="w", memory=Memory(), **given)


def test_a_size_that_is_none_is_an_error_at_once(router, link_of):
    with pytest.raises(ArgumentValueError, match="size_bytes got -1"):
        link_of(router).computed(1, -1)
