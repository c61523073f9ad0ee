"""What is on its way back to workers: jobs that are given up, slots that no job will use.

A message may be lost: each is repeated until its worker has said that it is done.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from hwcore.diffusion.messages import Abort, Release, Slot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.diffusion.router.outbox import Outbox
    from hwcore.diffusion.router.workers import Worker, Workers

__all__ = ["Returns"]


@dataclasses.dataclass(eq=False)
class _Abortion:
    """A job that is given up, until its worker says that nothing is left of it."""

    worker: Worker
    job: int
    resend_at: float
    slots: list[tuple[Worker, Slot]]  # given back then


class Returns:
    """Jobs and slots that workers are asked to let go of.

    Parameters
    ----------
    workers : Workers
    outbox : Outbox
    resend_after_s : float
    """

    def __init__(self, workers: Workers, outbox: Outbox, resend_after_s: float) -> None:
        self._workers, self._outbox, self._again_s = workers, outbox, resend_after_s
        self._abortions: dict[tuple[str, int], _Abortion] = {}
        self._releases: dict[tuple[str, int], tuple[Worker, Release, float]] = {}

    def __len__(self) -> int:
        return len(self._abortions) + len(self._releases)

    # --- Jobs ---

    def abort(self, worker: Worker, job: int, slots: list[tuple[Worker, Slot]], now: float) -> None:
        """Have a worker give up a job, and give slots back once nothing writes there any more."""
        abortion = _Abortion(worker, job, now + self._again_s, slots)
        if self._workers.get(worker.name) is worker:
            self._abortions[worker.name, job] = abortion
            self._outbox.by(abortion.resend_at)
            self._outbox.send(worker.name, Abort(worker.epoch, job))
        else:  # it died, and may have left a write under way
            self._end(abortion, worker.engine, now)

    def is_aborting(self, name: str, job: int) -> bool:
        """Say whether a worker was told to give a job up."""
        return (name, job) in self._abortions

    def aborted(self, name: str, job: int, now: float) -> None:
        """Take note that nothing is left of a job."""
        abortion = self._abortions.get((name, job))
        if abortion is not None:
            self._end(abortion, "", now)

    def _end(self, abortion: _Abortion, writer: str, now: float) -> None:
        self._abortions.pop((abortion.worker.name, abortion.job), None)
        for worker, slot in abortion.slots:
            self.release(worker, slot, writer, now)

    # --- Slots ---

    def release(self, worker: Worker, slot: Slot, writer: str, now: float) -> None:
        """Give a worker its slot back, if the worker is still there.

        ``writer`` is the engine of a worker that died and may still write there; empty if none may.
        """
        if self._workers.get(worker.name) is worker:
            worker.retire(slot, writer)
            release, due = Release(worker.epoch, slot, writer), now + self._again_s
            self._releases[worker.name, slot.lease] = (worker, release, due)
            self._outbox.by(due)
            self._outbox.send(worker.name, release)

    def listed(self, worker: Worker, slots: Sequence[Slot], now: float) -> None:
        """Compare with all the slots that a worker says are granted."""
        leases = {slot.lease for slot in slots}
        for key in [key for key in self._releases if key[0] == worker.name]:
            if key[1] not in leases:
                del self._releases[key]
        for slot in slots:  # that it should have back, and does not know of
            if slot.lease in worker.over and (worker.name, slot.lease) not in self._releases:
                self.release(worker, slot, worker.over[slot.lease], now)

    # --- Times ---

    def worker_died(self, dead: Worker, now: float) -> None:
        """End what a worker was asked for that is not there any more."""
        for key in [key for key in self._releases if key[0] == dead.name]:
            del self._releases[key]
        for abortion in [a for a in self._abortions.values() if a.worker is dead]:
            self._end(abortion, dead.engine, now)

    def tick(self, now: float) -> None:
        """Say again what got no answer."""
        for abortion in self._abortions.values():
            if now >= abortion.resend_at:
                abortion.resend_at = now + self._again_s
                message = Abort(abortion.worker.epoch, abortion.job)
                self._outbox.send(abortion.worker.name, message)
            self._outbox.by(abortion.resend_at)
        for key, (worker, release, due) in self._releases.items():
            if now >= due:
                due = now + self._again_s
                self._releases[key] = (worker, release, due)
                self._outbox.send(worker.name, release)
            self._outbox.by(due)
