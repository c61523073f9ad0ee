"""What a router knows of its workers: who is alive, what they have granted, what they do."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from hwcore.diffusion.messages import Slot
    from hwcore.diffusion.roles import RoleType
    from hwcore.diffusion.router.config import Policy

__all__ = ["Worker", "Workers"]

_REMEMBERED = 16384  # leases that are over: a message that is late may name one
_GRANTED = 16384
_SIZES = 1024


@dataclasses.dataclass(eq=False)
class Worker:
    """A worker under one epoch.

    Attributes
    ----------
    address, engine : str
        How others' engines reach its own, and know it.
    free : dict of int to Slot
        Granted, and promised to nobody, by lease.
    used : dict of int to Slot
        Promised to a job of which the worker knows nothing yet.
    over : dict of int to str
        Leases that are neither any more, and the engine that may still write there, if any.
    jobs : set of int
        What it computes, or will: outputs on their way to it count.
    wanted : dict of int to float
        Sizes that it was asked to grant, and when it may be asked again.
    """

    name: str
    role: RoleType
    epoch: int
    address: str
    engine: str
    capacity: int
    pool_bytes: int
    last_seen: float
    heartbeat: int = -1
    draining: bool = False
    free: dict[int, Slot] = dataclasses.field(default_factory=dict)
    used: dict[int, Slot] = dataclasses.field(default_factory=dict)
    jobs: set[int] = dataclasses.field(default_factory=set)
    over: dict[int, str] = dataclasses.field(default_factory=dict)
    wanted: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def takes_jobs(self) -> bool:
        """Whether it has room for one more."""
        return not self.draining and len(self.jobs) < self.capacity

    def grant(self, slots: Iterable[Slot]) -> None:
        """Take note of slots."""
        for slot in slots:
            if len(self.free) >= _GRANTED:
                return  # a heartbeat lists the others when there is room for them
            if not any(slot.lease in leases for leases in (self.free, self.used, self.over)):
                self.free[slot.lease] = slot
                self.wanted.pop(slot.size_bytes, None)  # the next one may be asked for at once

    def promise(self, slot: Slot) -> None:
        """Give a slot to a job."""
        self.used[slot.lease] = self.free.pop(slot.lease)

    def retire(self, slot: Slot, writer: str = "") -> None:
        """Forget a slot: its lease is over, or as good as over."""
        if self.used.pop(slot.lease, None) or self.free.pop(slot.lease, None):
            self.over[slot.lease] = writer
            if len(self.over) > _REMEMBERED:
                del self.over[next(iter(self.over))]

    def wants(self, size_bytes: int, now: float, again_s: float) -> bool:
        """Say whether it should be asked for a slot, which it is once in a while."""
        fits = size_bytes <= self.pool_bytes and self.takes_jobs
        if not fits or self.fitting(size_bytes) or now < self.wanted.get(size_bytes, 0.0):
            return False
        if len(self.wanted) > _SIZES:
            self.wanted.clear()
        self.wanted[size_bytes] = now + again_s
        return True

    def fitting(self, size_bytes: int) -> Slot | None:
        """Return the smallest free slot of at least this size."""
        fits = (slot for slot in self.free.values() if slot.size_bytes >= size_bytes)
        return min(fits, key=lambda slot: slot.size_bytes, default=None)


class Workers:
    """All workers, and the choice among them.

    Parameters
    ----------
    policy : str
        See :class:`~hwcore.diffusion.router.config.RouterConfig`.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._by_name: dict[str, Worker] = {}
        self._turns = itertools.count()
        self._chosen: dict[str, int] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Worker | None:
        """Return the worker of a name."""
        return self._by_name.get(name)

    def add(self, worker: Worker) -> None:
        """Add a worker, in place of one of its name."""
        self._by_name[worker.name] = worker

    def remove(self, worker: Worker) -> None:
        """Take a worker out."""
        del self._by_name[worker.name]
        self._chosen.pop(worker.name, None)

    def of(self, role: RoleType) -> list[Worker]:
        """Return the workers of a role."""
        return [worker for worker in self._by_name.values() if worker.role == role]

    def for_work(self, role: RoleType, avoided: Collection[str]) -> Worker | None:
        """Choose who computes next, or None where nobody has room.

        ``avoided`` names those that failed at it before: the others are waited for, if there are
        any.
        """
        workers = self._willing(role, avoided)
        return self._choose([worker for worker in workers if worker.takes_jobs])

    def for_output(
        self, role: RoleType, size_bytes: int, avoided: Collection[str]
    ) -> tuple[Worker, Slot] | None:
        """Choose who takes an output, and where to; None where nobody has room."""
        fits = [
            worker
            for worker in self._willing(role, avoided)
            if worker.takes_jobs and worker.fitting(size_bytes)
        ]
        worker = self._choose(fits)
        slot = worker.fitting(size_bytes) if worker else None
        return (worker, slot) if worker and slot else None

    def largest_free(self, role: RoleType) -> int | None:
        """Return the largest slot that could take an output now; -1 if there is none.

        None where nobody takes a job, whatever its slots.
        """
        takers = [worker for worker in self.of(role) if worker.takes_jobs]
        sizes = (slot.size_bytes for worker in takers for slot in worker.free.values())
        return max(sizes, default=-1) if takers else None

    def _willing(self, role: RoleType, avoided: Collection[str]) -> list[Worker]:
        workers = self.of(role)
        return [worker for worker in workers if worker.name not in avoided] or workers

    def _choose(self, workers: list[Worker]) -> Worker | None:
        """Choose by the policy; of equals the one that was chosen longest ago."""

        def order(worker: Worker) -> tuple[int, int]:
            last = self._chosen.get(worker.name, -1)
            busy = len(worker.jobs) - worker.capacity
            return (0 if self._policy == "round_robin" else busy, last)

        chosen = min(workers, key=order, default=None)
        if chosen is not None:
            self._chosen[chosen.name] = next(self._turns)
        return chosen
