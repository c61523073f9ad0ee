"""Requests that wait: for a worker of their first role, or for a slot of the next one."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from hwcore.diffusion.messages import Slot, Want
from hwcore.diffusion.router.requests import Request, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwcore.diffusion.roles import RoleType
    from hwcore.diffusion.router.outbox import Outbox
    from hwcore.diffusion.router.returns import Returns
    from hwcore.diffusion.router.workers import Worker, Workers

__all__ = ["Queues"]


class Queues:
    """Requests in the order in which they came, those that are begun anew before the others.

    Parameters
    ----------
    workers : Workers
    outbox : Outbox
    returns : Returns
    again_s : float
        After how long a worker is asked for a slot once more.
    """

    def __init__(self, workers: Workers, outbox: Outbox, returns: Returns, again_s: float) -> None:
        self._workers, self._outbox, self._returns = workers, outbox, returns
        self._again_s = again_s
        self._work: collections.deque[Request] = collections.deque()
        self._outputs: dict[RoleType, collections.deque[Request]] = collections.defaultdict(
            collections.deque
        )

    def lengths(self) -> dict[RoleType, int]:
        """Return how many requests wait for each role."""
        lengths = {role: len(waiting) for role, waiting in self._outputs.items()}
        for request in self._work:
            lengths[request.role] = lengths.get(request.role, 0) + 1
        return lengths

    def add(self, request: Request, *, first: bool = False) -> None:
        """Let a request wait, for what its state says."""
        queue = self._queue_of(request)
        (queue.appendleft if first else queue.append)(request)

    def remove(self, request: Request) -> None:
        """Take a request out, if its state says that it waits."""
        if request.state in (State.QUEUED, State.COMPUTED):
            self._queue_of(request).remove(request)

    def _queue_of(self, request: Request) -> collections.deque[Request]:
        if request.state is State.QUEUED:
            return self._work
        return self._outputs[request.stages[request.stage + 1]]

    def workable(self) -> Iterator[tuple[Request, Worker]]:
        """Take out each request that a worker has room for."""
        while self._work:
            worker = self._workers.for_work(self._work[0].role, self._work[0].avoided)
            if worker is None:
                return
            yield self._work.popleft(), worker

    def pushable(self, now: float) -> Iterator[tuple[Request, Worker, Slot]]:
        """Take out each output that there is a slot for, and ask for slots for the others.

        All are looked at: a large output that waits keeps no small one from going.
        """
        for role, waiting in self._outputs.items():
            if not waiting:
                continue
            largest, asked = self._workers.largest_free(role), set[int]()
            last = waiting[-1]
            for request in list(waiting):
                if largest is None:
                    break  # nobody takes a job: a slot would change nothing
                size_bytes, found = request.size_bytes, None
                if size_bytes <= largest:
                    found = self._workers.for_output(role, size_bytes, request.avoided)
                if found is not None:
                    waiting.remove(request)
                    yield request, *found
                elif size_bytes not in asked:
                    asked.add(size_bytes)
                    self._want(role, size_bytes, now)
                else:
                    continue
                if request is not last:
                    largest = self._workers.largest_free(role)
        if any(self._outputs.values()):
            self._outbox.by(now + self._again_s)

    def _want(self, role: RoleType, size_bytes: int, now: float) -> None:
        """Ask for a slot, once in a while, where none that is free would do."""
        for worker in self._workers.of(role):
            asked_before = size_bytes in worker.wanted
            if not worker.wants(size_bytes, now, self._again_s):
                continue
            if asked_before:  # what it has granted may be all that it has
                for slot in list(worker.free.values()):
                    self._returns.release(worker, slot, "", now)
            self._outbox.send(worker.name, Want(worker.epoch, size_bytes))
