"""A router's mind, without sockets and clocks: messages and times in, messages out.

Every request ends in one answer. What a request holds on workers (a job, a slot) is given back
whichever way it ends; what cannot be given back yet, because a message is lost or its writer may
still write, is asked for until it is.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, assert_never

from hwcore.diffusion.messages import (
    Abort,
    Aborted,
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
    Want,
    Work,
)
from hwcore.diffusion.router.config import RouterConfig
from hwcore.diffusion.router.requests import Answers, Frames, Request, State
from hwcore.diffusion.router.workers import Worker, Workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.diffusion.messages import FromClient, FromWorker
    from hwcore.diffusion.roles import RoleType

__all__ = ["RouterCore", "Sent"]

_MOST_TURNS = 8  # targets that an output is offered to, before its request is begun anew


@dataclasses.dataclass(frozen=True)
class Sent:
    """A message to a client or a worker, by the name that it came under."""

    to: str
    message: Any
    frames: Frames = ()


@dataclasses.dataclass(eq=False)
class _Abortion:
    """A job that is given up, until its worker says that nothing is left of it."""

    worker: Worker
    job: int
    resend_at: float
    slots: list[tuple[Worker, Slot]]  # given back then


class RouterCore:
    """Requests through workers.

    Parameters
    ----------
    config : RouterConfig, optional

    Attributes
    ----------
    workers : Workers
    draining : bool
    """

    def __init__(self, config: RouterConfig | None = None) -> None:
        self.config = config or RouterConfig()
        self.workers = Workers(self.config.policy)
        self.draining = False
        self._jobs = itertools.count(1)
        self._ended: dict[str, int] = {}  # the last epoch of workers that are not there any more
        self._requests: dict[str, Request] = {}
        self._by_job: dict[int, Request] = {}
        self._queue: collections.deque[Request] = collections.deque()
        self._waiting: dict[RoleType, collections.deque[Request]] = collections.defaultdict(
            collections.deque
        )
        self._abortions: dict[tuple[str, int], _Abortion] = {}
        self._releases: dict[tuple[str, int], tuple[Worker, Release, float]] = {}
        self._answers = Answers(self.config.keep_results_s, self.config.keep_results_bytes)
        self._outbox: list[Sent] = []

    # --- In and out ---

    def take(self) -> list[Sent]:
        """Return what is to be sent, in this order."""
        taken, self._outbox = self._outbox, []
        return taken

    @property
    def unfinished(self) -> int:
        """How many requests are not over."""
        return len(self._requests)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is under way: no request, and nothing left to be given back."""
        return not (self._requests or self._abortions or self._releases)

    def from_client(
        self, client: str, message: FromClient, frames: Sequence[bytes], now: float
    ) -> None:
        """Take in what a client said."""
        if isinstance(message, Submit):
            self._submit(client, message, tuple(frames), now)
        elif isinstance(message, Cancel):
            request = self._requests.get(message.request_id)
            mine = (message.request_id, message.attempt)
            if request is not None and request.key == mine and request.client == client:
                self._refuse(request, "cancelled", "its client cancelled it", False, now)
        else:
            assert_never(message)
        self._go_on(now)

    def client_gone(self, client: str, now: float) -> None:
        """Give up what a client wanted that is not there any more."""
        for request in [r for r in self._requests.values() if r.client == client]:
            self._refuse(request, "cancelled", "its client went away", True, now)
        self._go_on(now)

    def from_worker(
        self, name: str, message: FromWorker, frames: Sequence[bytes], now: float
    ) -> None:
        """Take in what a worker said."""
        worker = self.workers.get(name)
        if isinstance(message, Register):
            self._register(name, worker, message, now)
        elif isinstance(message, Aborted):
            self._aborted(name, message.job, now)  # of whichever epoch
        elif worker is None or message.epoch > worker.epoch:
            self._send(name, Reset(message.epoch))
        elif message.epoch == worker.epoch:
            worker.last_seen = now
            self._news(worker, message, tuple(frames), now)
        self._go_on(now)

    def tick(self, now: float) -> None:
        """Do what is due: deaths, deadlines, what must be said again."""
        for worker in self.workers:
            if now - worker.last_seen > self.config.dead_after_s:
                self.worker_died(worker.name, now)
        for request in list(self._requests.values()):
            self._check_times(request, now)
        for abortion in self._abortions.values():
            if now >= abortion.resend_at:
                abortion.resend_at = now + self.config.resend_after_s
                self._send(abortion.worker.name, Abort(abortion.worker.epoch, abortion.job))
        for key, (worker, release, due) in self._releases.items():
            if now >= due:
                self._releases[key] = (worker, release, now + self.config.resend_after_s)
                self._send(worker.name, release)
        self._answers.expire(now)
        self._go_on(now)

    def worker_died(self, name: str, now: float) -> None:
        """Begin anew what a worker had, and take back what was promised to it."""
        worker = self.workers.get(name)
        if worker is None:
            return
        self.workers.remove(worker)
        self._ended[name] = worker.epoch
        for key in [key for key in self._releases if key[0] == name]:
            del self._releases[key]
        for abortion in [a for a in self._abortions.values() if a.worker is worker]:
            self._end_abortion(abortion, worker.address, now)
        for request in list(self._requests.values()):
            if request.worker is worker:
                self._begin_anew(request, f"{worker.role} {name} died", "died", now)
            elif request.target is worker:
                self._untarget(request, now)

    def drain(self) -> None:
        """Take no more requests; those that there are go on."""
        self.draining = True

    def drain_worker(self, name: str) -> None:
        """Give a worker nothing new; what it has goes on."""
        worker = self.workers.get(name)
        if worker is not None:
            worker.draining = True
            self._send(name, Drain(worker.epoch))

    # --- Clients ---

    def _submit(self, client: str, message: Submit, frames: Frames, now: float) -> None:
        key = (message.request_id, message.attempt)
        running = self._requests.get(message.request_id)
        if running is not None:
            if running.key == key and running.client == client:
                return  # said twice, and answered when it is over
            text = "a request of this id is not over; wait for it, or take another id"
            self._send(client, Refused(*key, "duplicate", text, retryable=False))
            return
        answer = self._answers.get(key)
        if answer is not None and answer.client == client:
            self._send(client, answer.message, answer.frames)
            return
        stages = tuple(role for role in self.config.pipeline if role not in message.skip)
        refusal = self._refusal(stages)
        if refusal is not None:
            reason, text, retryable = refusal
            self._send(client, Refused(*key, reason, text, retryable))
            return
        deadline = now + message.deadline_s
        request = Request(key, client, frames, deadline, stages, now, message.progress)
        self._requests[message.request_id] = request
        self._queue.append(request)

    def _refusal(self, stages: tuple[RoleType, ...]) -> tuple[str, str, bool] | None:
        if self.draining:
            return "draining", "the router is shutting down; ask another", True
        if not stages:
            return "failed", "every role of the pipeline is skipped", False
        if len(self._requests) >= self.config.max_requests:
            text = f"{len(self._requests)} requests are not over, and more are not taken; ask later"
            return "busy", text, True
        return None

    def _refuse(
        self, request: Request, reason: str, text: str, retryable: bool, now: float
    ) -> None:
        self._answer(request, Refused(*request.key, reason, text[:4096], retryable), (), now)

    def _answer(
        self, request: Request, message: Result | Refused, frames: Frames, now: float
    ) -> None:
        """End a request: what it holds is given back, and its client told."""
        self._give_back(request, now)
        request.enter(State.OVER, now)
        del self._requests[request.key[0]]
        self._answers.add(request.key, request.client, message, frames, now)
        self._send(request.client, message, frames)

    # --- Workers ---

    def _register(self, name: str, known: Worker | None, message: Register, now: float) -> None:
        if known is not None and message.epoch < known.epoch:
            return  # it is late
        if known is None and message.epoch <= self._ended.get(name, -1):
            self._send(name, Reset(message.epoch))  # what it had then is not as it was
            return
        if known is not None and message.epoch > known.epoch:
            self.worker_died(name, now)
            known = None
        if known is None:
            known = Worker(
                name,
                message.role,
                message.epoch,
                message.address,
                message.capacity,
                message.pool_bytes,
                now,
            )
            self.workers.add(known)
        known.last_seen = now
        known.grant(message.slots)
        self._send(name, Registered(message.epoch, self.config.heartbeat_s))

    def _news(self, worker: Worker, message: FromWorker, frames: Frames, now: float) -> None:
        if isinstance(message, Granted):
            worker.grant(message.slots)
            return
        if isinstance(message, Heartbeat):
            self._heartbeat(worker, message, now)
            return
        assert not isinstance(message, Register | Aborted)
        request = self._by_job.get(message.job)
        if request is None or request.worker is not worker:
            return  # it is over; a heartbeat that lists it is answered
        self._acknowledge(request)
        if isinstance(message, Computed):
            self._computed(request, message.size_bytes, now)
        elif isinstance(message, Pushed):
            self._pushed(request, message.turn, frames, now)
        elif isinstance(message, Finished):
            self._send(worker.name, Forget(message.epoch, message.job))
            if request.is_last:
                self._end_job(request)
                self._answer(request, Result(*request.key), frames, now)
            else:
                text = "its worker ended it before the last stage"
                self._refuse(request, "failed", text, False, now)
        elif isinstance(message, Failed):
            self._failed(request, message, now)
        else:
            assert_never(message)

    def _heartbeat(self, worker: Worker, message: Heartbeat, now: float) -> None:
        if message.number <= worker.heartbeat:
            return  # it is late
        worker.heartbeat = message.number
        worker.grant(message.slots)
        listed = {slot.lease for slot in message.slots}
        for key in [key for key in self._releases if key[0] == worker.name]:
            if key[1] not in listed:
                del self._releases[key]
        for slot in message.slots:  # that it should have back, and does not know of
            if slot.lease in worker.over and (worker.name, slot.lease) not in self._releases:
                self._release(worker, slot, worker.over[slot.lease], now)
        for job in message.jobs:
            request = self._by_job.get(job)
            if request is not None and request.worker is worker:
                self._acknowledge(request)
            elif (worker.name, job) not in self._abortions:
                self._send(worker.name, Abort(worker.epoch, job))

    def _acknowledge(self, request: Request) -> None:
        """Note that the worker has the job: the slot with its input is the worker's own again."""
        if not request.acknowledged:
            request.acknowledged = True
            if request.input_slot is not None and request.worker is not None:
                request.worker.retire(request.input_slot)

    # --- Jobs ---

    def _start(self, request: Request, worker: Worker, now: float) -> None:
        """Give a worker the stage that is next; its input is the client's, or lies there."""
        request.job, request.worker = next(self._jobs), worker
        request.turn, request.acknowledged = 0, False
        self._by_job[request.job] = request
        worker.jobs.add(request.job)
        request.enter(State.RUNNING, now)
        self._send_work(request, now)
        if request.progress:
            progress = Progress(*request.key, request.role, request.round)
            self._send(request.client, progress)

    def _send_work(self, request: Request, now: float) -> None:
        request.resend_at = now + self.config.resend_after_s
        assert request.worker is not None
        frames = request.frames if request.input_slot is None else request.manifest
        work = Work(
            request.worker.epoch,
            request.job,
            request.key[0],
            max(1e-3, request.deadline - now),
            request.is_last,
            request.input_slot,
        )
        self._send(request.worker.name, work, frames)

    def _computed(self, request: Request, size_bytes: int, now: float) -> None:
        if request.state is not State.RUNNING:
            return  # said again
        if request.is_last:
            self._refuse(request, "failed", "its last worker has no result", False, now)
            return
        role = request.stages[request.stage + 1]
        largest = max((worker.pool_bytes for worker in self.workers.of(role)), default=None)
        if largest is not None and size_bytes > largest:
            text = f"the output of {request.role} takes {size_bytes} bytes, and no {role}'s pool "
            text += f"has more than {largest}; start one with a larger pool"
            self._refuse(request, "too large", text, False, now)
            return
        request.size_bytes = size_bytes
        request.enter(State.COMPUTED, now)
        self._waiting[role].append(request)

    def _push(self, request: Request, target: Worker, slot: Slot, now: float) -> None:
        request.turn += 1
        request.target, request.slot = target, slot
        target.promise(slot)
        target.jobs.add(-request.job)  # room for it, until it is a job there
        request.enter(State.PUSHING, now)
        self._send_push(request, now)

    def _send_push(self, request: Request, now: float) -> None:
        request.resend_at = now + self.config.resend_after_s
        assert request.worker is not None
        assert request.target is not None
        assert request.slot is not None
        push = Push(
            request.worker.epoch, request.job, request.turn, request.target.address, request.slot
        )
        self._send(request.worker.name, push)

    def _pushed(self, request: Request, turn: int, frames: Frames, now: float) -> None:
        if request.state is not State.PUSHING or turn != request.turn:
            return  # it is late: that target died, and its slot with it
        assert request.worker is not None
        target, slot = request.target, request.slot
        assert target is not None
        self._send(request.worker.name, Forget(request.worker.epoch, request.job))
        target.jobs.discard(-request.job)
        self._end_job(request)
        request.stage += 1
        request.input_slot, request.manifest = slot, frames
        request.target = request.slot = None
        self._start(request, target, now)

    def _failed(self, request: Request, message: Failed, now: float) -> None:
        assert request.worker is not None
        if message.turn == 0:
            self._send(request.worker.name, Forget(message.epoch, message.job))
            request.avoided.add(request.worker.name)
            self._end_job(request)
            if message.retryable:
                self._begin_anew(request, message.text, "failed", now)
            else:
                self._refuse(request, "failed", message.text, False, now)
        elif request.state is State.PUSHING and message.turn == request.turn:
            assert request.target is not None
            request.avoided.add(request.target.name)
            self._untarget(request, now)
            if request.turn >= _MOST_TURNS:
                self._begin_anew(request, message.text, "failed", now)

    def _untarget(self, request: Request, now: float) -> None:
        """Let an output wait for another slot: the one that it was promised takes nothing."""
        target, slot = request.target, request.slot
        assert target is not None
        assert slot is not None
        target.jobs.discard(-request.job)
        self._release(target, slot, "", now)
        request.target = request.slot = None
        request.enter(State.COMPUTED, now)
        self._waiting[request.stages[request.stage + 1]].appendleft(request)

    def _begin_anew(self, request: Request, text: str, reason: str, now: float) -> None:
        """Begin a request from its input, unless that was done often enough."""
        if request.round >= self.config.max_rounds:
            text = f"begun {request.round} times; the last time {text}"
            self._refuse(request, reason, text, True, now)
            return
        if request.worker is not None:
            request.avoided.add(request.worker.name)
        self._give_back(request, now)
        request.round += 1
        request.stage, request.input_slot, request.manifest = 0, None, ()
        request.enter(State.QUEUED, now)
        self._queue.appendleft(request)

    # --- Giving back ---

    def _end_job(self, request: Request) -> None:
        """Note that a job is over and that its worker knows."""
        if request.worker is not None:
            request.worker.jobs.discard(request.job)
        self._by_job.pop(request.job, None)
        request.worker, request.job = None, 0

    def _give_back(self, request: Request, now: float) -> None:
        """Take a request off workers and lists."""
        if request.state is State.QUEUED:
            self._queue.remove(request)
        if request.state is State.COMPUTED:
            self._waiting[request.stages[request.stage + 1]].remove(request)
        slots = []
        if request.target is not None and request.slot is not None:
            request.target.jobs.discard(-request.job)
            slots.append((request.target, request.slot))
        worker, job = request.worker, request.job
        if worker is not None and request.input_slot is not None and not request.acknowledged:
            slots.append((worker, request.input_slot))
        request.target = request.slot = None
        if worker is None:
            return
        self._end_job(request)
        abortion = _Abortion(worker, job, now + self.config.resend_after_s, slots)
        if self.workers.get(worker.name) is worker:
            self._abortions[worker.name, job] = abortion
            self._send(worker.name, Abort(worker.epoch, job))
        else:  # it died, and may have left a write under way
            self._end_abortion(abortion, worker.address, now)

    def _aborted(self, name: str, job: int, now: float) -> None:
        abortion = self._abortions.get((name, job))
        if abortion is not None:
            self._end_abortion(abortion, "", now)

    def _end_abortion(self, abortion: _Abortion, writer: str, now: float) -> None:
        self._abortions.pop((abortion.worker.name, abortion.job), None)
        for worker, slot in abortion.slots:
            self._release(worker, slot, writer, now)

    def _release(self, worker: Worker, slot: Slot, writer: str, now: float) -> None:
        """Give a worker its slot back, if the worker is still there."""
        if self.workers.get(worker.name) is worker:
            worker.retire(slot, writer)
            release = Release(worker.epoch, slot, writer)
            due = now + self.config.resend_after_s
            self._releases[worker.name, slot.lease] = (worker, release, due)
            self._send(worker.name, release)

    # --- Going on ---

    def _go_on(self, now: float) -> None:
        """Start what can start."""
        for role, waiting in self._waiting.items():
            # All are looked at: a large output that waits keeps no small one from going.
            for request in list(waiting):
                found = self.workers.for_output(role, request.size_bytes, request.avoided)
                if found is None:
                    self._want(role, request, now)
                    continue
                waiting.remove(request)
                self._push(request, *found, now)
        while self._queue:
            worker = self.workers.for_work(self._queue[0].role, self._queue[0].avoided)
            if worker is None:
                return
            self._start(self._queue.popleft(), worker, now)

    def _want(self, role: RoleType, request: Request, now: float) -> None:
        """Ask for a slot, once in a while, where none that is free would do."""
        for worker in self.workers.of(role):
            asked_before = request.size_bytes in worker.wanted
            if not worker.wants(request.size_bytes, now, self.config.resend_after_s):
                continue
            if asked_before:  # what it has granted may be all that it has
                for slot in list(worker.free.values()):
                    self._release(worker, slot, "", now)
            self._send(worker.name, Want(worker.epoch, request.size_bytes))

    def _check_times(self, request: Request, now: float) -> None:
        config = self.config
        if now >= request.deadline:
            text = f"not done by its deadline: it {request.state.value}"
            self._refuse(request, "deadline", text, True, now)
        elif request.state is State.RUNNING:
            if now - request.since >= config.job_timeout_s:
                text = f"{request.role} had no output after {config.job_timeout_s} s"
                self._begin_anew(request, text, "failed", now)
            elif not request.acknowledged and now >= request.resend_at:
                self._send_work(request, now)
        elif request.state is State.PUSHING:
            if now - request.since >= config.push_timeout_s:
                text = f"its output was not there after {config.push_timeout_s} s"
                self._begin_anew(request, text, "failed", now)
            elif now >= request.resend_at:
                self._send_push(request, now)

    def _send(self, to: str, message: Any, frames: Frames = ()) -> None:
        self._outbox.append(Sent(to, message, frames))
