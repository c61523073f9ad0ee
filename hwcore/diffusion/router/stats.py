"""How a router is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hwcore.diffusion.router.core import RouterCore

__all__ = ["RouterStats", "WorkerStats", "stats_of"]


@dataclasses.dataclass(frozen=True)
class WorkerStats:
    """A worker as the router sees it."""

    role: str
    epoch: int
    jobs: int
    capacity: int
    free_slots: int
    draining: bool


@dataclasses.dataclass(frozen=True)
class RouterStats:
    """A router's state at one time.

    Attributes
    ----------
    unfinished : int
        Requests that have no answer yet.
    is_settled : bool
        Whether there are none, and workers hold nothing of those of before.
    waiting : dict of str to int
        Of these, those that wait for a role.
    workers : dict of str to WorkerStats
        By name.
    clients : int
        That have said something in the last while.
    dropped : dict of str to int
        Frames and connections, by reason.
    draining : bool
    """

    unfinished: int
    is_settled: bool
    waiting: dict[str, int]
    workers: dict[str, WorkerStats]
    clients: int
    dropped: dict[str, int]
    draining: bool


def stats_of(core: RouterCore, clients: int, dropped: dict[str, int]) -> RouterStats:
    """Return the state of a router with this mind."""
    workers = {
        worker.name: WorkerStats(
            str(worker.role),
            worker.epoch,
            len(worker.jobs),
            worker.capacity,
            len(worker.free),
            worker.draining,
        )
        for worker in core.workers
    }
    waiting = {str(role): count for role, count in core.queued().items()}
    settled = core.is_settled
    return RouterStats(core.unfinished, settled, waiting, workers, clients, dropped, core.draining)
