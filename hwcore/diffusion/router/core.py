"""A router's mind, without sockets and clocks: messages and times in, messages out.

Every request ends in one answer. What a request holds on workers (a job, a slot) is given back
whichever way it ends; what cannot be given back yet, because a message is lost or its writer may
still write, is asked for until it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from hwcore.diffusion.messages import (
    Alive,
    Cancel,
    Refused,
    Result,
    Submit,
    Unknown,
    Welcome,
)
from hwcore.diffusion.router.config import RouterConfig
from hwcore.diffusion.router.jobs import Jobs
from hwcore.diffusion.router.outbox import Observer, Outbox, Sent
from hwcore.diffusion.router.registry import Registry
from hwcore.diffusion.router.requests import Answers, Key, Request, State
from hwcore.diffusion.router.returns import Returns
from hwcore.diffusion.router.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.diffusion.messages import FromClient, FromWorker
    from hwcore.diffusion.roles import RoleType
    from hwcore.diffusion.router.outbox import Frames
    from hwcore.diffusion.router.workers import Worker

__all__ = ["RouterCore", "Sent"]


class RouterCore:
    """Requests through workers.

    Parameters
    ----------
    config : RouterConfig, optional
    observer : Observer, optional
        Told what becomes of requests.
    first_job : int
        A number that no job of a router before had: late news of those must not be taken for
        news of this one's.

    Attributes
    ----------
    workers : Workers
    draining : bool
    """

    def __init__(
        self,
        config: RouterConfig | None = None,
        observer: Observer | None = None,
        first_job: int = 1,
    ) -> None:
        self.config = config or RouterConfig()
        self.workers = Workers(self.config.policy)
        self.draining = False
        self._observer = observer or Observer()
        self._requests: dict[str, Request] = {}
        self._input_bytes = 0  # of these requests
        self._outbox = Outbox()
        self._returns = Returns(self.workers, self._outbox, self.config.resend_after_s)
        self._jobs = Jobs(
            self.config,
            self.workers,
            self._outbox,
            self._returns,
            self._observer,
            first_job,
            self._answer,
        )
        self._registry = Registry(
            self.config, self.workers, self._outbox, self._returns, self._jobs, self._worker_died
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
        elif isinstance(message, Alive):
            for request_id, attempt in message.requests:
                self._asked(client, (request_id, attempt), now)
            welcome = Welcome(self.config.heartbeat_s, self.config.max_input_bytes)
            self._outbox.send(client, welcome)
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
        self._registry.hear(name, message, tuple(frames), now)
        self._jobs.go_on(now)

    def confirm(self, name: str, epoch: int) -> None:
        """Tell a worker that it is known, if it is: after each heartbeat."""
        self._registry.confirm(name, epoch)

    def tick(self, now: float) -> None:
        """Do what is due: deaths, deadlines, what must be said again."""
        self._outbox.due = float("inf")  # everything that is still to come says so anew
        self._registry.tick(now)
        self._jobs.tick(list(self._requests.values()), now)
        self._returns.tick(now)
        self._answers.expire(now)
        self._outbox.by(self._answers.due)
        self._jobs.go_on(now)

    def excuse_silence(self, now: float) -> None:
        """Count the silence of workers from now on: this router did not listen for a while."""
        for worker in self.workers:
            worker.last_seen = now

    def give_up(self, now: float) -> None:
        """Refuse every request that is not over: this router ends."""
        self.draining = True
        for request in list(self._requests.values()):
            self._refuse(request, "draining", "the router was shut down; ask again", True, now)

    def drain(self) -> None:
        """Take no more requests; those that there are go on."""
        self.draining = True

    def drain_worker(self, name: str) -> bool:
        """Give a worker nothing new; what it has goes on. Say whether there is one."""
        return self._registry.drain(name)

    def _worker_died(self, worker: Worker, now: float) -> None:
        self._returns.worker_died(worker, now)
        self._jobs.worker_died(worker, list(self._requests.values()), now)

    # --- Clients ---

    def _asked(self, client: str, key: Key, now: float) -> None:
        """Say what became of a request, if its client may have missed that."""
        running = self._requests.get(key[0])
        if running is not None and running.key == key and running.client == client:
            return
        answer = self._answers.get(key)
        if answer is None or answer.client != client:
            self._outbox.send(client, Unknown(*key))
        elif now >= answer.said_at + self.config.resend_after_s:
            answer.said_at = now
            self._outbox.send(client, answer.message, answer.frames)

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
        size_bytes = sum(map(len, frames))
        refusal = self._refusal(stages, size_bytes)
        if refusal is not None:
            reason, text, retryable = refusal
            self._turn_away(client, Refused(*key, reason, text, retryable))
            return
        deadline = now + message.deadline_s
        request = Request(key, client, frames, deadline, stages, now, now, message.progress)
        self._requests[message.request_id] = request
        self._input_bytes += size_bytes
        self._jobs.add(request)

    def _refusal(
        self, stages: tuple[RoleType, ...], size_bytes: int
    ) -> tuple[str, str, bool] | None:
        if self.draining:
            return "draining", "the router is shutting down; ask another", True
        if not stages:
            return "failed", "every role of the pipeline is skipped", False
        if len(self._requests) >= self.config.max_requests:
            text = f"{len(self._requests)} requests are not over, and more are not taken; ask later"
            return "busy", text, True
        if size_bytes > self.config.max_input_bytes:
            text = f"the input takes {size_bytes} bytes, and {self.config.max_input_bytes} is most"
            return "too large", text, False
        if self._input_bytes + size_bytes > self.config.max_waiting_bytes:
            text = f"inputs of {self._input_bytes} bytes are waiting, which is enough; ask later"
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
        self._input_bytes -= sum(map(len, request.frames))
        outcome = message.reason if isinstance(message, Refused) else "result"
        self._observer.answered(outcome, now - request.begun)
        self._answers.add(request.key, request.client, message, frames, now)
        self._outbox.by(self._answers.due)
        self._outbox.send(request.client, message, frames)
