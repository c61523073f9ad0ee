"""A router's mind: every request ends in one answer, and nothing is left behind."""

import contextlib
import random

import pytest

from hwcore.diffusion.messages import (
    Abort,
    Alive,
    Cancel,
    Forget,
    FromClient,
    FromRouter,
    FromWorker,
    Heartbeat,
    Progress,
    Push,
    Refused,
    Register,
    Release,
    Reset,
    Result,
    Slot,
    Submit,
    ToClient,
    Unknown,
    Welcome,
    Work,
    decode,
    encode,
)
from hwcore.diffusion.roles import PIPELINE, RoleType
from hwcore.diffusion.router import registry
from hwcore.diffusion.router.config import RouterConfig
from hwcore.diffusion.router.core import RouterCore
from hwcore.diffusion.router.todo import Compute, Restart
from hwcore.errors import PeerError

from ._world import Faults, World

pytestmark = pytest.mark.usefixtures("once")  # numbers and messages: there is no device in it


def served(world, count=1, until=100.0, **options):
    for number in range(count):
        world.submit(f"r{number}", **options)
    world.run(until)
    return world


def test_a_request_passes_every_role_and_comes_back():
    world = served(World())
    message, frames = world.answers["r0", 1]
    assert isinstance(message, Result)
    assert frames == (b"r0 encoder denoiser decoder",)
    world.check_nothing_left()


def test_many_at_once_all_come_back():
    world = served(World(), count=200)
    assert all(isinstance(message, Result) for message, _ in world.answers.values())
    world.check_answers()
    world.check_nothing_left()
    assert world.computed == 600, "nothing is computed twice where nothing goes wrong"


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_network_does_every_request_has_its_result(seed):
    faults = Faults(lost=0.1, twice=0.1, late=0.2)
    world = served(World(seed, faults), count=30, until=50.0)
    world.check_answers()
    assert all(isinstance(message, Result) for message, _ in world.answers.values())
    world.faults = Faults()
    world.run(60.0)
    world.check_nothing_left()


def chaos(world, until):
    """Kill, stop and start processes again, until a time; then let all run."""
    chance = world.chance
    when = 0.5
    while when < until:
        process = chance.choice(list(world.processes.values()))
        what = chance.choice(["kill", "stop"])
        back = when + chance.uniform(0.1, 8.0)
        world.at(when, None, lambda p=process, w=what: hurt(p, w))
        world.at(back, None, lambda p=process: heal(p))
        when += chance.expovariate(1 / 1.5)


def hurt(process, what):
    if what == "kill" and process.alive:
        process.kill()
    elif what == "stop":
        process.stopped = True


def heal(process):
    process.stopped = False
    if not process.alive:
        process.start()


def some_world(seed):
    """A world with a network, sizes, numbers and limits of its own."""
    pick = random.Random(seed).choice
    faults = Faults(
        lost=pick([0, 0.03, 0.1]),
        twice=pick([0, 0.03, 0.1]),
        late=pick([0, 0.1, 0.3]),
        late_s=pick([0.5, 2, 6]),
    )
    return World(
        seed,
        faults,
        failing=pick([0, 0.02, 0.2]),
        sizes=pick([(10, 90), (1, 1000), (400, 600), (0, 3)]),
        capacity=pick([1, 4, 16]),
        stock=pick([(), (100,) * 3, (50, 200)]),
        workers={role: pick([1, 2, 3]) for role in PIPELINE},
        config=RouterConfig(policy=pick(["round_robin", "max_free_slots"])),
    )


# Some found a fault once that thousands of others did not.
FOUND_FAULTS = [1071, 1831, 2016, 2274]


@pytest.mark.parametrize("seeds", [range(n, n + 20) for n in range(0, 460, 20)] + [FOUND_FAULTS])
def test_whoever_dies_or_hangs_every_request_is_answered_once_and_nothing_is_left(seeds):
    for seed in seeds:
        world = some_world(seed)
        for number in range(30):
            deadline_s = world.chance.choice([5.0, 60.0])
            when = world.chance.uniform(0, 20)
            world.at(when, None, lambda n=number, w=world, d=deadline_s: w.submit(f"r{n}", d))
        chaos(world, until=30.0)
        world.run(40.0)
        world.faults, world.failing = Faults(), 0.0
        for process in world.processes.values():
            heal(process)
        world.run(200.0)
        world.check_answers()
        world.check_nothing_left()


# --- Clients --------------------------------------------------------------------------------------


def said(world, name, attempt=1):
    message, _ = world.answers[name, attempt]
    return (message.reason, message.retryable) if isinstance(message, Refused) else "result"


def again(world, name, attempt=1, client="client"):
    """Ask from outside the world, and return what the router says at once."""
    world.router.from_client(client, Submit(name, attempt, 60.0), (name.encode(),), world.now)
    return [sent.message for sent in world.router.take() if sent.to == client]


def test_who_asks_again_gets_the_same_answer_and_nothing_is_computed_twice():
    world = served(World(), until=20.0)
    assert [type(message) for message in again(world, "r0")] == [Result]
    assert world.computed == 3
    world.check_nothing_left()


def test_an_answer_is_kept_for_a_while_only():
    world = served(World(config=RouterConfig(keep_results_s=5.0)))
    assert again(world, "r0") == [], "it is a new request"
    world.run(200.0)
    assert world.computed == 6


def test_results_are_kept_up_to_a_number_of_bytes():
    world = served(World(config=RouterConfig(keep_results_s=500, keep_results_bytes=100)), count=9)
    kept = [number for number in range(9) if again(world, f"r{number}")]
    assert 1 <= len(kept) <= 4


def test_an_id_that_is_taken_is_refused_and_the_first_goes_on():
    world = World()
    world.submit("r0")
    world.run(0.005)
    for attempt, client in ((2, "client"), (1, "another"), (2, "another")):
        (message,) = again(world, "r0", attempt, client)
        assert (message.reason, message.retryable) == ("duplicate", False)
    assert again(world, "r0") == [], "said twice by the same client, it is the same"
    world.run(10.0)
    assert said(world, "r0") == "result"


def test_another_client_does_not_get_the_answer_of_the_first():
    world = served(World(), until=20.0)
    assert again(world, "r0", client="another") == []
    world.run(40.0)
    assert world.computed == 6


def test_a_cancelled_request_ends_and_leaves_nothing():
    world = World()
    world.submit("r0")
    for when in (0.01, 0.02, 0.03, 0.04, 0.05, 0.06):
        world.submit(f"r{when}")
        world.at(when, None, lambda name=f"r{when}": cancel(world, name))
    world.run(20.0)
    assert said(world, "r0") == "result"
    assert ("cancelled", False) in [said(world, name) for name, _ in world.answers]
    world.check_nothing_left()


def cancel(world, name):
    world.router.from_client("client", Cancel(name, 1), (), world.now)


def test_nobody_cancels_what_is_anothers():
    world = World()
    world.submit("r0")
    world.run(0.005)
    world.router.from_client("another", Cancel("r0", 1), (), world.now)
    world.router.from_client("client", Cancel("r0", 2), (), world.now)
    world.run(20.0)
    assert said(world, "r0") == "result"


def test_a_client_that_goes_away_takes_its_requests_along():
    world = World()
    for number in range(20):
        world.submit(f"r{number}")
    world.at(0.03, None, lambda: world.router.client_gone("client", world.now))
    world.run(20.0)
    assert ("cancelled", True) in [said(world, f"r{number}") for number in range(20)]
    world.check_nothing_left()


def test_a_router_with_enough_to_do_says_so():
    world = served(World(config=RouterConfig(max_requests=5)), count=8, until=0.01)
    world.run(20.0)
    answers = [said(world, f"r{number}") for number in range(8)]
    assert sorted(map(str, answers)) == ["('busy', True)"] * 3 + ["result"] * 5


def test_a_router_that_drains_ends_what_it_has_and_takes_nothing():
    world = World()
    world.submit("r0")
    world.run(0.01)
    world.router.drain()
    world.submit("r1")
    world.run(20.0)
    assert said(world, "r0") == "result"
    assert said(world, "r1") == ("draining", True)
    assert world.router.is_settled


def test_a_request_without_workers_ends_at_its_deadline():
    world = served(World(workers={RoleType.ENCODER: 1}), deadline_s=5.0, until=8.0)
    assert said(world, "r0") == ("deadline", True)
    world.run(20.0)
    world.check_nothing_left()


def test_a_role_that_is_skipped_computes_nothing():
    pipeline = (RoleType.IMAGE_ENCODER, *PIPELINE)
    world = World(workers=dict.fromkeys(pipeline, 1), config=RouterConfig(pipeline=pipeline))
    served(world, skip=[RoleType.IMAGE_ENCODER])
    assert world.answers["r0", 1][1] == (b"r0 encoder denoiser decoder",)
    world.submit("r1")
    world.run(200.0)
    assert world.answers["r1", 1][1] == (b"r1 image_encoder encoder denoiser decoder",)


def test_progress_is_told_to_who_wants_it():
    world = served(World(), progress=True)
    steps = [message.role for message in world.said if isinstance(message, Progress)]
    assert sorted(steps) == sorted(PIPELINE)
    assert not any(isinstance(message, Progress) for message in served(World()).said)


def alive(world, *keys, client="client"):
    """Say from outside the world that a client waits, and return what the router says at once."""
    world.router.from_client(client, Alive(list(keys)), (), world.now)
    *said, welcome = [sent.message for sent in world.router.take() if sent.to == client]
    assert isinstance(welcome, Welcome)
    return said


def test_who_waits_and_missed_the_answer_gets_it_again_once_in_a_while():
    world = served(World(), until=20.0)
    assert [type(message) for message in alive(world, ("r0", 1))] == [Result]
    assert alive(world, ("r0", 1)) == [], "it may be under way"
    world.run(21.5)
    assert [type(message) for message in alive(world, ("r0", 1))] == [Result]


def test_who_waits_for_what_is_under_way_is_told_nothing():
    world = World()
    world.submit("r0")
    world.run(0.01)
    assert alive(world, ("r0", 1)) == []


def test_who_waits_for_what_the_router_does_not_know_is_told_so():
    world = served(World(), until=20.0)
    for keys, client in (("r9", 1), "client"), (("r0", 2), "client"), (("r0", 1), "another"):
        assert alive(world, keys, client=client) == [Unknown(*keys)]


# --- Workers --------------------------------------------------------------------------------------


def test_an_output_that_no_pool_could_hold_ends_its_request_and_both_sizes_are_named():
    world = served(World(sizes=(2000, 2000)))
    message, _ = world.answers["r0", 1]
    assert (message.reason, message.retryable) == ("too large", False)
    assert "takes 2000 bytes, and no denoiser's pool has more than 1000" in message.text
    world.run(200.0)
    world.check_nothing_left()


def test_an_output_larger_than_any_slot_gets_one_that_is_made_for_it():
    world = served(World(sizes=(900, 1000)), count=10)
    assert {said(world, f"r{number}") for number in range(10)} == {"result"}
    world.check_nothing_left()


def test_without_a_stock_one_slot_after_the_other_is_asked_for_at_once():
    world = served(World(stock=(), sizes=(100, 100)), 20, until=1.5)
    assert len(world.answers) == 20
    world.check_answers()


def test_outputs_of_no_bytes_need_a_slot_too():
    world = served(World(sizes=(0, 0)), count=10)
    assert {said(world, f"r{number}") for number in range(10)} == {"result"}


def test_a_large_output_is_not_put_off_for_ever_by_small_ones():
    world = World(workers=dict.fromkeys(PIPELINE, 1))
    world.size_of = lambda value: 1000 if value.startswith("large") else 90
    for number in range(100):
        world.at(number * 0.02, None, lambda n=number: world.submit(f"r{n}"))
    world.at(0.2, None, lambda: world.submit("large"))
    world.run(30.0)
    assert said(world, "large") == "result"


def test_a_worker_whose_job_fails_for_good_ends_the_request():
    world = World()
    world.submit("r0")
    for process in world.processes.values():
        process.compute = lambda todo, process=process: process.mind.failed(
            todo.job, "this prompt is no prompt", retryable=False
        )
    world.run(20.0)
    message, _ = world.answers["r0", 1]
    assert (message.reason, message.text) == ("failed", "this prompt is no prompt")
    assert not message.retryable


def test_a_request_is_begun_so_many_times_and_the_last_reason_is_told():
    world = served(World(failing=1.0))
    message, _ = world.answers["r0", 1]
    assert message.reason == "failed"
    assert message.text == "begun 3 times; the last time out of luck"
    assert world.computed == 3


def test_a_hang_ends_in_another_round():
    world = World(config=RouterConfig(job_timeout_s=5.0))
    hung = world.processes["denoiser-0"]
    hung.compute = lambda todo: None
    served(world, count=4, until=50.0)
    assert {said(world, f"r{number}") for number in range(4)} == {"result"}


def test_where_every_target_fails_they_are_tried_again():
    world = World()
    for process in world.processes.values():
        process.failures = 2
        process.transfer = lambda todo, process=process: flaky(process, todo)
    served(world, count=4, until=50.0)
    assert {said(world, f"r{number}") for number in range(4)} == {"result"}
    world.run(60.0)
    world.check_nothing_left()


def flaky(process, todo):
    if process.failures:
        process.failures -= 1
        del process.writing[todo.job]
        process.mind.push_failed(todo.job, todo.turn, "the network is down")
    else:
        type(process).transfer(process, todo)


@pytest.mark.parametrize("policy", ["round_robin", "max_free_slots"])
def test_work_is_spread_over_workers(policy):
    world = served(World(config=RouterConfig(policy=policy)), count=100)
    counts = [process.done for process in world.processes.values()]
    assert min(counts) >= 40, counts


def test_the_one_with_most_room_is_chosen():
    world = World(config=RouterConfig(policy="max_free_slots"))
    world.processes["encoder-0"].mind._capacity = 1
    world.processes["encoder-1"].mind._capacity = 100
    served(world, count=50, until=0.5)
    assert world.processes["encoder-0"].done <= 2


def test_a_worker_that_drains_gets_nothing_new():
    world = World()
    world.run(1.0)
    world.router.drain_worker("denoiser-0")
    served(world, count=20)
    assert world.processes["denoiser-0"].done == 0
    assert world.processes["denoiser-0"].mind.draining
    world.check_answers()


def test_a_late_word_of_a_dead_worker_does_not_bring_it_back():
    world = World()
    world.run(1.0)
    process = world.processes["denoiser-0"]
    register = Register(process.role, process.mind.epoch, process.address, process.engine, 4, 1000)
    process.kill()
    world.run(10.0)
    world.router.from_worker("denoiser-0", register, (), world.now)
    assert [sent.message for sent in world.router.take()] == [Reset(process.mind.epoch)]
    assert world.router.workers.get("denoiser-0") is None


@pytest.mark.parametrize("seed", range(5))
def test_a_router_that_begins_anew_serves_what_was_asked(seed):
    world = World(seed, Faults(lost=0.05, twice=0.05, late=0.3))
    for number in range(20):
        world.submit(f"r{number}")
    world.run(0.05 + 0.01 * seed)
    world.router = RouterCore(world.config, first_job=1 << 20)
    world.run(50.0)
    world.check_answers()
    assert {said(world, f"r{number}") for number in range(20)} == {"result"}
    world.faults = Faults()
    world.run(60.0)
    world.check_nothing_left()


def test_a_worker_that_begins_below_a_known_epoch_is_told_which():
    world = World()
    world.run(1.0)
    process = world.processes["denoiser-0"]
    process.kill()
    world.run(10.0)
    early = Register(process.role, 5, process.address, process.engine, 4, 1000)
    world.router.from_worker("denoiser-0", early, (), world.now)
    assert [sent.message for sent in world.router.take()] == [Reset(5, process.mind.epoch)]
    mind = world.processes["denoiser-1"].mind
    mind.from_router(Reset(mind.epoch, 1 << 60), (), world.now)
    assert mind.todo() == [Restart()]
    mind.restarted("a", "e", mind._slots)
    assert mind.epoch == (1 << 60) + 1


def test_what_is_remembered_of_workers_that_are_gone_is_bounded(monkeypatch):
    monkeypatch.setattr(registry, "_REMEMBERED", 10)
    router = RouterCore()
    for number in range(30):
        message = Register(RoleType.ENCODER, 1, "a", "e", 1, 1)
        router.from_worker(f"w{number}", message, (), 0.0)
    router.tick(100.0)
    assert len(router.workers) == 0
    assert list(router._registry._ended) == [f"w{number}" for number in range(20, 30)]


def test_the_router_knows_when_it_is_due_next():
    world = World()
    world.run(1.0)
    router = world.router
    router.tick(world.now)
    dead = min(worker.last_seen for worker in router.workers) + world.config.dead_after_s
    assert router.due == pytest.approx(dead)
    router.from_client("client", Submit("r", 1, 0.5), (b"r",), world.now)
    assert router.due == pytest.approx(world.now + 0.5)
    router.tick(world.now + 0.5)
    answers = [sent.message for sent in router.take() if isinstance(sent.message, Refused)]
    assert [message.reason for message in answers] == ["deadline"]
    assert router.due > world.now + 0.5


def test_a_router_with_nothing_to_do_is_due_when_its_answers_are_old_and_then_no_more():
    router = RouterCore(RouterConfig(keep_results_s=60.0))
    router.from_client("client", Submit("r", 1, 0.5), (b"r",), 0.0)
    assert router.due == 0.5
    router.tick(0.5)
    router.tick(1.0)
    assert router.due == 60.5
    router.tick(60.5)
    assert router.due == float("inf")
    assert again_at(router, 61.0) == [], "it is a new request"


def again_at(router, now):
    router.take()
    router.from_client("client", Submit("r", 1, 0.5), (b"r",), now)
    return router.take()


def test_a_slot_that_a_dead_worker_may_still_write_to_names_the_workers_engine():
    world, said = World(), []
    world.run(1.0)
    send = world.send
    world.send = lambda source, to, *what: (said.append((to, what[0])), send(source, to, *what))
    world.submit("r0")
    while not any(process.writing for process in world.processes.values()):
        world.run(world.now + 0.001)
    (writer,) = [process for process in world.processes.values() if process.writing]
    engine, (lease,) = writer.engine, writer.writing.values()
    writer.stopped = True
    world.run(10.0)
    released = {(it.slot.lease, it.writer) for _, it in said if isinstance(it, Release)}
    assert released == {(lease, engine)}
    assert all(to.startswith("denoiser-") for to, it in said if isinstance(it, Release))


def test_a_slot_that_both_sides_lost_sight_of_is_given_back():
    """The release was lost, and an older heartbeat, without the slot, came after it."""
    world = World()
    world.run(1.0)
    worker = world.router.workers.get("denoiser-0")
    slot = next(iter(worker.free.values()))
    worker.retire(slot, "00000000000000e2")
    world.router.from_worker(
        "denoiser-0", Heartbeat(worker.epoch, 1 << 40, [], [slot]), (), world.now
    )
    assert [sent.message for sent in world.router.take()] == [
        Release(worker.epoch, slot, "00000000000000e2")
    ], "whoever may still write there is named again"
    worker.heartbeat = 0
    world.processes["denoiser-0"].memory.free(slot, "")
    world.run(5.0)
    world.check_nothing_left()
    assert slot.lease not in world.processes["denoiser-0"].memory.slots


# --- A worker's mind ------------------------------------------------------------------------------


@pytest.fixture
def worker():
    """A worker that is registered, and has nothing to do."""
    world = World()
    world.run(1.0)
    return world.processes["encoder-0"]


def test_one_output_is_pushed_once_at_a_time(worker):
    mind, slot = worker.mind, Slot(1, 0, 10)
    mind.from_router(Work(mind.epoch, 1, "r", 9.0, False), (b"r",), 1.0)
    mind.computed(1, 10)
    for turn in (1, 3, 2):
        mind.from_router(Push(mind.epoch, 1, turn, "a", slot), (), 1.0)
    compute, first = mind.todo()
    assert isinstance(compute, Compute)
    assert (first.turn, mind.todo()) == (1, [])
    mind.push_failed(1, 1, "gone")
    assert [todo.turn for todo in mind.todo()] == [3]


def test_a_job_that_is_over_is_not_done_again(worker):
    mind = worker.mind
    work = Work(mind.epoch, 1, "r", 9.0, True)
    mind.from_router(Abort(mind.epoch, 1), (), 1.0)
    mind.from_router(work, (b"r",), 1.0)
    assert mind.todo() == [], "the abort was faster than the work"
    mind.from_router(Work(mind.epoch, 2, "r", 9.0, True), (b"r",), 1.0)
    mind.finished(2, ())
    mind.from_router(Forget(mind.epoch, 2), (), 1.0)
    mind.todo()
    mind.dropped(2)
    mind.from_router(Work(mind.epoch, 2, "r", 9.0, True), (b"r",), 1.0)
    assert mind.todo() == []


def test_a_slot_that_was_taken_is_followed_by_another(worker):
    mind, slot = worker.mind, next(iter(worker.memory.slots.values()))
    mind.take()
    mind.from_router(Work(mind.epoch, 1, "r", 9.0, True, slot), (b"r",), 1.0)
    ((granted, _),) = mind.take()
    assert [new.size_bytes for new in granted.slots] == [slot.size_bytes]
    assert len(worker.memory.slots) == 3


def test_a_slot_that_was_given_back_takes_no_job(worker):
    mind = worker.mind
    mind.take()
    mind.from_router(Work(mind.epoch, 1, "r", 9.0, True, Slot(999, 0, 5)), (b"r",), 1.0)
    (word, _), *_ = mind.take()
    assert (word.job, word.retryable) == (1, True)
    assert "slot 999 is not granted" in word.text


def test_work_for_an_epoch_of_before_is_not_done(worker):
    """A worker that died and began again under its name: another has the job by now."""
    mind = worker.mind
    mind.from_router(Work(mind.epoch - 1, 1, "r", 9.0, True), (b"r",), 1.0)
    assert mind.todo() == []


def test_a_worker_that_begins_again_says_no_job_is_over_but_what_its_new_epoch_says(worker):
    mind = worker.mind
    mind.from_router(Work(mind.epoch, 1, "r", 9.0, False), (b"r",), 1.0)
    mind.from_router(Abort(mind.epoch, 1), (), 1.0)  # its owner is at it, and then is late
    mind.take()
    mind.reset()
    mind.dropped(1)
    assert mind.todo()[-1] == Restart()
    mind.restarted("new", "f" * 16, worker.memory)
    mind.tick(1.5)
    assert [type(message) for message, _ in mind.take()] == [Register]


def test_a_reset_for_an_epoch_of_before_is_late(worker):
    epoch = worker.mind.epoch
    worker.mind.from_router(Reset(epoch - 1), (), 1.0)
    assert worker.mind.todo() == []
    worker.mind.from_router(Reset(epoch), (), 1.0)
    assert worker.mind.todo() == [Restart()]


# --- Frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FromClient, FromWorker, FromRouter, ToClient])
def test_no_frame_does_harm(kind):
    chance = random.Random(1)
    for _ in range(3000):
        frame = chance.choice([b"", b"\x01", b"\x02"]) + chance.randbytes(chance.randrange(60))
        with contextlib.suppress(PeerError):
            decode(frame, kind)


def test_a_valid_frame_with_a_byte_changed_is_a_message_or_refused():
    chance = random.Random(1)
    frame = encode(Work(1, 7, "request", 9.0, False, Slot(1, 2, 3)))
    for _ in range(3000):
        changed = bytearray(frame)
        changed[chance.randrange(len(frame))] = chance.randrange(256)
        with contextlib.suppress(PeerError):
            assert isinstance(decode(changed, FromRouter), FromRouter)


@pytest.mark.parametrize(
    "bad",
    [
        Submit("", 1, 1.0),
        Submit("r" * 300, 1, 1.0),
        Submit("r", -1, 1.0),
        Submit("r", 1, 0.0),
        Submit("r", 1, float("nan")),
        Submit("r", 1, float("inf")),
    ],
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(PeerError, match="expected a message"):
        decode(encode(bad), FromClient)


def test_another_version_is_named():
    with pytest.raises(PeerError, match=r"the version got 9 \(int\); expected 1"):
        decode(b"\x09" + encode(Cancel("r", 1))[1:], FromClient)
