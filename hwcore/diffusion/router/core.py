"""A router's mind, without sockets and clocks: messages and times in, messages out.

Every request ends in one answer. What a request holds on workers (a job, a slot) is given back
whichever way it ends; what cannot be given back yet, because a message is lost or its writer may
still write, is asked for until it is.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, assert_never

from hwcore.diffusion.messages import (
    Abort,
    Aborted,
    Cancel,
    Drain,
    Granted,
    Heartbeat,
    Refused,
    Register,
    Registered,
    Reset,
    Result,
    Submit,
)
from hwcore.diffusion.router.config import RouterConfig
from hwcore.diffusion.router.jobs import Jobs
from hwcore.diffusion.router.outbox import Observer, Outbox, Sent
from hwcore.diffusion.router.requests import Answers, Request, State
from hwcore.diffusion.router.returns import Returns
from hwcore.diffusion.router.workers import Worker, Workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.diffusion.messages import FromClient, FromWorker
    from hwcore.diffusion.roles import RoleType
    from hwcore.diffusion.router.outbox import Frames

__all__ = ["RouterCore", "Sent"]

_REMEMBERED = 16384  # epochs of workers that are gone: what comes late names one


class RouterCore:
    """Requests through workers.

    Parameters
    ----------
    config : RouterConfig, optional
    observer : Observer, optional
        Told what becomes of requests.

    Attributes
    ----------
    workers : Workers
    draining : bool
    """

    def __init__(
        self, config: RouterConfig | None = None, observer: Observer | None = None
    ) -> None:
        self.config = config or RouterConfig()
        self.workers = Workers(self.config.policy)
        self.draining = False
        self._observer = observer or Observer()
        self._ended: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._requests: dict[str, Request] = {}
        self._outbox = Outbox()
        self._returns = Returns(self.workers, self._outbox, self.config.resend_after_s)
        self._jobs = Jobs(
            self.config, self.workers, self._outbox, self._returns, self._observer, self._answer
        )
        self._answers = Answers(self.config.keep_results_s, self.config.keep_results_bytes)

    # --- In and out ---

    def take(self) -> list[Sent]:
        """Return what is to be sent, in this order."""
        return self._outbox.take()

    @property
    def due(self) -> float:
        """When :meth:`tick` is to be called, at the latest."""
        return self._outbox.due

    @property
    def unfinished(self) -> int:
        """How many requests are not over."""
        return len(self._requests)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is under way: no request, and nothing left to be given back."""
        return not (self._requests or self._returns)

    def queued(self) -> dict[RoleType, int]:
        """Return how many requests wait for a worker or a slot of each role."""
        return self._jobs.queues.lengths()

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
        self._jobs.go_on(now)

    def client_gone(self, client: str, now: float) -> None:
        """Give up what a client wanted that is not there any more."""
        for request in [r for r in self._requests.values() if r.client == client]:
            self._refuse(request, "cancelled", "its client went away", True, now)
        self._jobs.go_on(now)

    def from_worker(
        self, name: str, message: FromWorker, frames: Sequence[bytes], now: float
    ) -> None:
        """Take in what a worker said."""
        worker = self.workers.get(name)
        if isinstance(message, Register):
            self._register(name, worker, message, now)
        elif isinstance(message, Aborted):
            self._returns.aborted(name, message.job, now)  # of whichever epoch
        elif worker is None or message.epoch > worker.epoch:
            self._outbox.send(name, Reset(message.epoch))
        elif message.epoch == worker.epoch:
            worker.last_seen = now
            self._news(worker, message, tuple(frames), now)
        self._jobs.go_on(now)

    def tick(self, now: float) -> None:
        """Do what is due: deaths, deadlines, what must be said again."""
        self._outbox.due = float("inf")  # everything that is still to come says so anew
        for worker in self.workers:
            if now - worker.last_seen > self.config.dead_after_s:
                self.worker_died(worker.name, now)
            else:
                self._outbox.by(worker.last_seen + self.config.dead_after_s)
        self._jobs.tick(list(self._requests.values()), now)
        self._returns.tick(now)
        self._answers.expire(now)
        self._outbox.by(self._answers.due)
        self._jobs.go_on(now)

    def worker_died(self, name: str, now: float) -> None:
        """Begin anew what a worker had, and take back what was promised to it."""
        worker = self.workers.get(name)
        if worker is None:
            return
        self.workers.remove(worker)
        self._ended[name] = worker.epoch
        self._ended.move_to_end(name)
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        self._returns.worker_died(worker, now)
        self._jobs.worker_died(worker, list(self._requests.values()), now)

    def drain(self) -> None:
        """Take no more requests; those that there are go on."""
        self.draining = True

    def drain_worker(self, name: str) -> bool:
        """Give a worker nothing new; what it has goes on. Say whether there is one."""
        worker = self.workers.get(name)
        if worker is None:
            return False
        worker.draining = True
        self._outbox.send(name, Drain(worker.epoch))
        return True

    # --- Clients ---

    def _submit(self, client: str, message: Submit, frames: Frames, now: float) -> None:
        key = (message.request_id, message.attempt)
        running = self._requests.get(message.request_id)
        if running is not None:
            if running.key == key and running.client == client:
                return  # said twice, and answered when it is over
            text = "a request of this id is not over; wait for it, or take another id"
            self._turn_away(client, Refused(*key, "duplicate", text, retryable=False))
            return
        answer = self._answers.get(key)
        if answer is not None and answer.client == client:
            self._outbox.send(client, answer.message, answer.frames)
            return
        stages = tuple(role for role in self.config.pipeline if role not in message.skip)
        refusal = self._refusal(stages)
        if refusal is not None:
            reason, text, retryable = refusal
            self._turn_away(client, Refused(*key, reason, text, retryable))
            return
        deadline = now + message.deadline_s
        request = Request(key, client, frames, deadline, stages, now, now, message.progress)
        self._requests[message.request_id] = request
        self._jobs.add(request)

    def _refusal(self, stages: tuple[RoleType, ...]) -> tuple[str, str, bool] | None:
        if self.draining:
            return "draining", "the router is shutting down; ask another", True
        if not stages:
            return "failed", "every role of the pipeline is skipped", False
        if len(self._requests) >= self.config.max_requests:
            text = f"{len(self._requests)} requests are not over, and more are not taken; ask later"
            return "busy", text, True
        return None

    def _turn_away(self, client: str, refused: Refused) -> None:
        self._observer.answered(refused.reason, 0.0)
        self._outbox.send(client, refused)

    def _refuse(
        self, request: Request, reason: str, text: str, retryable: bool, now: float
    ) -> None:
        self._answer(request, Refused(*request.key, reason, text[:4096], retryable), (), now)

    def _answer(
        self, request: Request, message: Result | Refused, frames: Frames, now: float
    ) -> None:
        """End a request: what it holds is given back, and its client told."""
        self._jobs.give_back(request, now)
        request.enter(State.OVER, now)
        del self._requests[request.key[0]]
        outcome = message.reason if isinstance(message, Refused) else "result"
        self._observer.answered(outcome, now - request.begun)
        self._answers.add(request.key, request.client, message, frames, now)
        self._outbox.by(self._answers.due)
        self._outbox.send(request.client, message, frames)

    # --- Workers ---

    def _register(self, name: str, known: Worker | None, message: Register, now: float) -> None:
        if known is not None and message.epoch < known.epoch:
            return  # it is late
        if known is None and message.epoch <= self._ended.get(name, -1):
            self._outbox.send(name, Reset(message.epoch))  # what it had then is not as it was
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
                message.engine,
                message.capacity,
                message.pool_bytes,
                now,
            )
            self.workers.add(known)
            self._outbox.by(now + self.config.dead_after_s)
        known.last_seen = now
        known.grant(message.slots)
        self._outbox.send(name, Registered(message.epoch, self.config.heartbeat_s))

    def _news(self, worker: Worker, message: FromWorker, frames: Frames, now: float) -> None:
        if isinstance(message, Granted):
            worker.grant(message.slots)
            return
        if isinstance(message, Heartbeat):
            self._heartbeat(worker, message, now)
            return
        assert not isinstance(message, Register | Aborted)
        request = self._jobs.of(worker, message.job)
        if request is not None:  # else it is over; a heartbeat that lists it is answered
            self._jobs.news(request, message, frames, now)

    def _heartbeat(self, worker: Worker, message: Heartbeat, now: float) -> None:
        if message.number <= worker.heartbeat:
            return  # it is late
        worker.heartbeat = message.number
        worker.grant(message.slots)
        self._returns.listed(worker, message.slots, now)
        for job in message.jobs:
            request = self._jobs.of(worker, job)
            if request is not None:
                self._jobs.acknowledge(request)
            elif not self._returns.is_aborting(worker.name, job):
                self._outbox.send(worker.name, Abort(worker.epoch, job))
