"""Requests on workers: the stages of each, from one worker's memory into the next one's."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hwcore.diffusion.messages import (
    Computed,
    Failed,
    Finished,
    Forget,
    Progress,
    Pushed,
    Refused,
    Result,
)
from hwcore.diffusion.router.queues import Queues
from hwcore.diffusion.router.requests import Request, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hwcore.diffusion.messages import Slot
    from hwcore.diffusion.router.config import RouterConfig
    from hwcore.diffusion.router.outbox import Frames, Observer, Outbox
    from hwcore.diffusion.router.returns import Returns
    from hwcore.diffusion.router.workers import Worker, Workers

__all__ = ["Jobs"]

_MOST_TURNS = 8  # targets that an output is offered to, before its request is begun anew


class Jobs:
    """The stages of requests.

    Parameters
    ----------
    config : RouterConfig
    workers : Workers
    outbox : Outbox
    returns : Returns
    observer : Observer
    first_job : int
    answer : callable
        Ends a request, once, and calls :meth:`give_back`.
    """

    def __init__(
        self,
        config: RouterConfig,
        workers: Workers,
        outbox: Outbox,
        returns: Returns,
        observer: Observer,
        first_job: int,
        answer: Callable[[Request, Result | Refused, Frames, float], None],
    ) -> None:
        self._config, self._workers = config, workers
        self._outbox, self._returns = outbox, returns
        self._observer, self._answer = observer, answer
        self._numbers = itertools.count(first_job)
        self._by_job: dict[int, Request] = {}
        self.queues = Queues(workers, outbox, returns, config.resend_after_s)

    def of(self, worker: Worker, job: int) -> Request | None:
        """Return the request whose stage runs as this job on this worker."""
        request = self._by_job.get(job)
        return request if request is not None and request.worker is worker else None

    def add(self, request: Request) -> None:
        """Begin a request, when there is room."""
        self.queues.add(request)
        self._outbox.by(request.deadline)

    # --- What workers say ---

    def news(
        self,
        request: Request,
        message: Computed | Pushed | Finished | Failed,
        frames: Frames,
        now: float,
    ) -> None:
        """Take in what its worker said of a request."""
        self.acknowledge(request)
        if isinstance(message, Computed):
            self._computed(request, message.size_bytes, now)
        elif isinstance(message, Pushed):
            self._pushed(request, message.turn, frames, now)
        elif isinstance(message, Finished):
            self._finished(request, message, frames, now)
        else:
            self._failed(request, message, now)

    def acknowledge(self, request: Request) -> None:
        """Note that the worker has the job: the slot with its input is the worker's own again."""
        if not request.acknowledged:
            request.acknowledged = True
            if request.input_slot is not None and request.worker is not None:
                request.worker.retire(request.input_slot)

    def _computed(self, request: Request, size_bytes: int, now: float) -> None:
        if request.state is not State.RUNNING:
            return  # said again
        self._observer.stage_done(request.role, now - request.since)
        if request.is_last:
            self._refuse(request, "failed", "its last worker has no result", False, now)
            return
        role = request.stages[request.stage + 1]
        largest = max((worker.pool_bytes for worker in self._workers.of(role)), default=None)
        if largest is not None and size_bytes > largest:
            text = f"the output of {request.role} takes {size_bytes} bytes, and no {role}'s pool "
            text += f"has more than {largest}; start one with a larger pool"
            self._refuse(request, "too large", text, False, now)
            return
        request.size_bytes = size_bytes
        request.enter(State.COMPUTED, now)
        self.queues.add(request)

    def _pushed(self, request: Request, turn: int, frames: Frames, now: float) -> None:
        if request.state is not State.PUSHING or turn != request.turn:
            return  # it is late: that target died, and its slot with it
        worker, job = request.worker, request.job
        target, slot = request.target, request.slot
        assert worker is not None
        assert target is not None
        self._observer.pushed(request.size_bytes)
        target.jobs.discard(-job)
        self._end_job(request)
        request.stage += 1
        request.input_slot, request.manifest = slot, frames
        request.target = request.slot = None
        self._start(request, target, now)  # first what somebody waits for
        self._outbox.send(worker.name, Forget(worker.epoch, job))

    def _finished(self, request: Request, message: Finished, frames: Frames, now: float) -> None:
        worker = request.worker
        assert worker is not None
        if request.is_last:
            self._observer.stage_done(request.role, now - request.since)
            self._end_job(request)
            self._answer(request, Result(*request.key), frames, now)
        else:
            text = "its worker ended it before the last stage"
            self._refuse(request, "failed", text, False, now)
        self._outbox.send(worker.name, Forget(message.epoch, message.job))

    def _failed(self, request: Request, message: Failed, now: float) -> None:
        assert request.worker is not None
        if message.turn == 0:
            self._outbox.send(request.worker.name, Forget(message.epoch, message.job))
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

    def worker_died(self, dead: Worker, requests: Iterable[Request], now: float) -> None:
        """Begin anew what a worker had, and take back what was promised to it."""
        for request in requests:
            if request.worker is dead:
                self._begin_anew(request, f"{dead.role} {dead.name} died", "died", now)
            elif request.target is dead:
                self._untarget(request, now)

    # --- From state to state ---

    def _start(self, request: Request, worker: Worker, now: float) -> None:
        """Give a worker the stage that is next; its input is the client's, or lies there."""
        request.job, request.worker = next(self._numbers), worker
        request.turn, request.acknowledged = 0, False
        self._by_job[request.job] = request
        worker.jobs.add(request.job)
        request.enter(State.RUNNING, now)
        self._send_work(request, now)
        if request.progress:
            progress = Progress(*request.key, request.role, request.round)
            self._outbox.send(request.client, progress)

    def _send_work(self, request: Request, now: float) -> None:
        request.resend_at = now + self._config.resend_after_s
        self._outbox.by(request.due(self._config))
        assert request.worker is not None
        frames = request.frames if request.input_slot is None else request.manifest
        self._outbox.send(request.worker.name, request.work(now), frames)

    def _push(self, request: Request, target: Worker, slot: Slot, now: float) -> None:
        request.turn += 1
        request.target, request.slot = target, slot
        target.promise(slot)
        target.jobs.add(-request.job)  # room for it, until it is a job there
        request.enter(State.PUSHING, now)
        self._send_push(request, now)

    def _send_push(self, request: Request, now: float) -> None:
        request.resend_at = now + self._config.resend_after_s
        self._outbox.by(request.due(self._config))
        assert request.worker is not None
        self._outbox.send(request.worker.name, request.push())

    def _untarget(self, request: Request, now: float) -> None:
        """Let an output wait for another slot: the one that it was promised takes nothing."""
        target, slot = request.target, request.slot
        assert target is not None
        assert slot is not None
        target.jobs.discard(-request.job)
        self._returns.release(target, slot, "", now)
        request.target = request.slot = None
        request.enter(State.COMPUTED, now)
        self.queues.add(request, first=True)

    def _begin_anew(self, request: Request, text: str, reason: str, now: float) -> None:
        """Begin a request from its input, unless that was done often enough."""
        if request.round >= self._config.max_rounds:
            text = f"begun {request.round} times; the last time {text}"
            self._refuse(request, reason, text, True, now)
            return
        if request.worker is not None:
            request.avoided.add(request.worker.name)
        self.give_back(request, now)
        self._observer.begun_anew(reason)
        request.round += 1
        request.stage, request.input_slot, request.manifest = 0, None, ()
        request.enter(State.QUEUED, now)
        self.queues.add(request, first=True)

    def _refuse(
        self, request: Request, reason: str, text: str, retryable: bool, now: float
    ) -> None:
        self._answer(request, Refused(*request.key, reason, text[:4096], retryable), (), now)

    def _end_job(self, request: Request) -> None:
        """Note that a job is over and that its worker knows."""
        if request.worker is not None:
            request.worker.jobs.discard(request.job)
        self._by_job.pop(request.job, None)
        request.worker, request.job = None, 0

    def give_back(self, request: Request, now: float) -> None:
        """Take a request off workers and lists."""
        self.queues.remove(request)
        slots = []
        if request.target is not None and request.slot is not None:
            request.target.jobs.discard(-request.job)
            slots.append((request.target, request.slot))
        worker, job = request.worker, request.job
        if worker is not None and request.input_slot is not None and not request.acknowledged:
            slots.append((worker, request.input_slot))
        request.target = request.slot = None
        if worker is not None:
            self._end_job(request)
            self._returns.abort(worker, job, slots, now)

    def go_on(self, now: float) -> None:
        """Start what can start."""
        for request, target, slot in self.queues.pushable(now):
            self._push(request, target, slot, now)
        for request, worker in self.queues.workable():
            self._start(request, worker, now)

    # --- Times ---

    def tick(self, requests: Iterable[Request], now: float) -> None:
        """Do what is due of each request."""
        config = self._config
        for request in requests:
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
            self._outbox.by(request.due(self._config))
