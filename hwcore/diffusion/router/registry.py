"""Workers that come, say that they are there, and go."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from hwcore.diffusion.messages import (
    Abort,
    Aborted,
    Drain,
    Granted,
    Heartbeat,
    Register,
    Registered,
    Reset,
)
from hwcore.diffusion.router.workers import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.diffusion.messages import FromWorker
    from hwcore.diffusion.router.config import RouterConfig
    from hwcore.diffusion.router.jobs import Jobs
    from hwcore.diffusion.router.outbox import Frames, Outbox
    from hwcore.diffusion.router.returns import Returns
    from hwcore.diffusion.router.workers import Workers

__all__ = ["Registry"]

_REMEMBERED = 16384  # epochs of workers that are gone: what comes late names one


class Registry:
    """What workers say, by the epoch under which they say it.

    Parameters
    ----------
    config : RouterConfig
    workers : Workers
    outbox : Outbox
    returns : Returns
    jobs : Jobs
    died : callable
        Called with a worker that is not there any more, once it is taken out.
    """

    def __init__(
        self,
        config: RouterConfig,
        workers: Workers,
        outbox: Outbox,
        returns: Returns,
        jobs: Jobs,
        died: Callable[[Worker, float], None],
    ) -> None:
        self._config, self._workers, self._outbox = config, workers, outbox
        self._returns, self._jobs, self._died = returns, jobs, died
        self._ended: collections.OrderedDict[str, int] = collections.OrderedDict()

    def hear(self, name: str, message: FromWorker, frames: Frames, now: float) -> None:
        """Take in what a worker said."""
        worker = self._workers.get(name)
        if isinstance(message, Register):
            self._register(name, worker, message, now)
        elif isinstance(message, Aborted):
            self._returns.aborted(name, message.job, now)  # of whichever epoch
        elif worker is None or message.epoch > worker.epoch:
            self._outbox.send(name, Reset(message.epoch))
        elif message.epoch == worker.epoch:
            worker.last_seen = now
            self._news(worker, message, frames, now)

    def confirm(self, name: str, epoch: int) -> None:
        """Tell a worker that it is known, if it is.

        Also after each heartbeat: who hears nothing knows that its connection is dead.
        """
        worker = self._workers.get(name)
        if worker is not None and worker.epoch == epoch:
            config = self._config
            registered = Registered(epoch, config.heartbeat_s, config.max_result_bytes)
            self._outbox.send(name, registered)

    def drain(self, name: str) -> bool:
        """Give a worker nothing new; what it has goes on. Say whether there is one."""
        worker = self._workers.get(name)
        if worker is None:
            return False
        worker.draining = True
        self._outbox.send(name, Drain(worker.epoch))
        return True

    def end(self, name: str, now: float) -> None:
        """Take a worker out: it is dead, or begins anew."""
        worker = self._workers.get(name)
        if worker is None:
            return
        self._workers.remove(worker)
        self._ended[name] = worker.epoch
        self._ended.move_to_end(name)
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        self._died(worker, now)

    def tick(self, now: float) -> None:
        """Take out who has said nothing for too long."""
        for worker in self._workers:
            if now - worker.last_seen > self._config.dead_after_s:
                self.end(worker.name, now)
            else:
                self._outbox.by(worker.last_seen + self._config.dead_after_s)

    def _register(self, name: str, known: Worker | None, message: Register, now: float) -> None:
        if known is not None and message.epoch < known.epoch:
            return  # it is late
        ended = self._ended.get(name, -1)
        if known is None and message.epoch <= ended:  # what it had then is not as it was
            self._outbox.send(name, Reset(message.epoch, ended if ended > message.epoch else 0))
            return
        if known is not None and message.epoch > known.epoch:
            self.end(name, now)
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
            self._workers.add(known)
            self._outbox.by(now + self._config.dead_after_s)
        known.last_seen = now
        known.grant(message.slots)
        self.confirm(name, message.epoch)

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
