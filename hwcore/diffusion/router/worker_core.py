"""A worker's mind, without sockets and clocks: what it does for a router, and what it says.

The one who owns it computes and moves bytes: it takes :class:`Todo` from :meth:`WorkerCore.todo`,
and reports what became of it.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any, assert_never

from hwcore.diffusion.messages import (
    Abort,
    Aborted,
    Computed,
    Drain,
    Failed,
    Finished,
    Forget,
    Granted,
    Heartbeat,
    Push,
    Pushed,
    Register,
    Registered,
    Release,
    Reset,
    Want,
    Work,
)
from hwcore.diffusion.router.grants import Grants
from hwcore.diffusion.router.todo import Compute, Drop, Restart, Transfer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.diffusion.messages import FromRouter
    from hwcore.diffusion.roles import RoleType
    from hwcore.diffusion.router.outbox import Frames
    from hwcore.diffusion.router.todo import Slots, Todo

__all__ = ["WorkerCore"]

_REMEMBERED = 65536  # jobs that are over: `Work` may come late, and must not be done twice


class _State(enum.Enum):
    RUNNING = "computes"
    SAID = "waits for the router's answer"
    PUSHING = "pushes"
    DROPPING = "is let go"


@dataclasses.dataclass
class _Job:
    state: _State = _State.RUNNING
    turn: int = 0
    word: Any = None  # the last, repeated until it is answered
    frames: Frames = ()
    next: Push | None = None
    forgotten: bool = False


class WorkerCore:
    """The jobs of a worker.

    Parameters
    ----------
    role : RoleType
    epoch : int
        Higher than at any time before under the worker's name.
    address, engine : str
        Of its engine: how others reach it, and its id.
    capacity : int
    pool_bytes : int
    slots : Slots
    sizes : sequence of int
        What it grants from the beginning. Later as many, of the sizes that were used last.
    """

    def __init__(
        self,
        role: RoleType,
        epoch: int,
        address: str,
        engine: str,
        capacity: int,
        pool_bytes: int,
        slots: Slots,
        sizes: Sequence[int] = (),
    ) -> None:
        self.role, self.epoch = role, epoch
        self.address, self.engine = address, engine
        self.draining = False
        self._capacity, self._pool_bytes = capacity, pool_bytes
        self._slots = slots
        self._grants = Grants(slots, sizes)
        self._heartbeat_s: float | None = None  # unknown to the router
        self._resetting = False
        self._known = 0
        self._due = 0.0
        self._number = 0
        self._jobs: dict[int, _Job] = {}
        self._over: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._outbox: list[tuple[Any, Frames]] = []
        self._todo: list[Todo] = []

    # --- In and out ---

    def take(self) -> list[tuple[Any, Frames]]:
        """Return what is to be sent to the router, in this order."""
        taken, self._outbox = self._outbox, []
        return taken

    def todo(self) -> list[Todo]:
        """Return what is to be done, in this order."""
        taken, self._todo = self._todo, []
        return taken

    @property
    def is_registered(self) -> bool:
        """Whether the router knows it."""
        return self._heartbeat_s is not None and not self._resetting

    @property
    def heartbeat_s(self) -> float | None:
        """How often it says that it is alive; None before it is registered."""
        return self._heartbeat_s

    @property
    def due(self) -> float:
        """When :meth:`tick` is to be called, at the latest."""
        return math.inf if self._resetting else self._due

    @property
    def is_idle(self) -> bool:
        """Whether it has no job."""
        return not self._jobs

    def tick(self, now: float) -> None:
        """Do what is due: register, say that it is alive, say again what got no answer."""
        self.grant()
        if self._resetting or now < self._due:
            return
        if self._heartbeat_s is None:
            self._due = now + 0.2
            place = (self.address, self.engine, self._capacity, self._pool_bytes)
            self._send(Register(self.role, self.epoch, *place, self._slots.granted()))
            return
        self._due = now + self._heartbeat_s
        self._number += 1
        self._send(Heartbeat(self.epoch, self._number, list(self._jobs), self._slots.granted()))
        for job in self._jobs.values():
            if job.word is not None:
                self._send(job.word, job.frames)

    # --- What the router says ---

    def from_router(self, message: FromRouter, frames: Sequence[bytes], now: float) -> None:
        """Take in what the router said."""
        if self._resetting or message.epoch != self.epoch:
            return  # it is late
        if isinstance(message, Registered):
            if self._heartbeat_s is None:
                self._heartbeat_s, self._due = message.heartbeat_s, now
        elif isinstance(message, Reset):
            self.reset(message.known)
        elif isinstance(message, Work):
            self._work(message, tuple(frames))
        elif isinstance(message, Push):
            self._push(message)
        elif isinstance(message, Forget):
            self._forget(message.job)
        elif isinstance(message, Abort):
            self._abort(message.job)
        elif isinstance(message, Want):
            self._grants.want(message.size_bytes)
            self.grant()
        elif isinstance(message, Release):
            self._slots.free(message.slot, message.writer)
            self.grant()
        elif isinstance(message, Drain):
            self.draining = True
        else:
            assert_never(message)

    def reset(self, known: int = 0) -> None:
        """Begin again under a new epoch, as if this worker had died.

        The router knows nothing of the jobs, nor of the slots; or nobody can say what the engine
        may still write. ``known`` is an epoch that the new one has to be above.
        """
        if self._resetting:
            return
        self._known = known
        self._resetting = True
        self._grants.forget_wanted()
        for number in list(self._jobs):
            self._abort(number)
        self._restart_if_idle()

    def restarted(self, address: str, engine: str, slots: Slots) -> None:
        """Report the new pool, and its engine."""
        self.address, self.engine = address, engine
        self._slots = self._grants.slots = slots
        self.epoch = max(self.epoch, self._known) + 1
        self._heartbeat_s, self._due, self._number = None, 0.0, 0
        self._resetting = False

    def _restart_if_idle(self) -> None:
        if self._resetting and not self._jobs:
            self._todo.append(Restart())

    def _work(self, message: Work, frames: Frames) -> None:
        job = message.job
        if job in self._jobs or job in self._over:
            return
        self._jobs[job] = _Job()
        if message.slot is not None and not self._slots.consume(message.slot):
            text = f"slot {message.slot.lease} is not granted any more"
            self.failed(job, text, retryable=True)
            return
        if message.slot is not None:
            self._grants.used(message.slot.size_bytes)
            self.grant()  # another in its place: the next output need not wait for a heartbeat
        self._todo.append(
            Compute(
                job,
                message.request_id,
                frames,
                message.slot,
                message.last,
                message.remaining_s,
            )
        )

    def _push(self, message: Push) -> None:
        job = self._jobs.get(message.job)
        if job is None or job.state is _State.DROPPING or message.turn <= job.turn:
            return
        if job.state is _State.PUSHING:
            if job.next is None or message.turn > job.next.turn:
                job.next = message  # one at a time
            return
        job.turn, job.word, job.frames, job.state = message.turn, None, (), _State.PUSHING
        self._todo.append(Transfer(message.job, message.turn, message.address, message.slot))

    def _forget(self, number: int) -> None:
        job = self._jobs.get(number)
        if job is None or job.state is _State.RUNNING:
            return
        job.forgotten = True
        self._drop(number, job)

    def _abort(self, number: int) -> None:
        job = self._jobs.get(number)
        if job is None:
            self._is_over(number)
            self._send(Aborted(self.epoch, number))
            return
        job.forgotten = False
        self._drop(number, job)

    def _drop(self, number: int, job: _Job) -> None:
        if job.state is not _State.DROPPING:
            job.state, job.word, job.frames = _State.DROPPING, None, ()
            self._todo.append(Drop(number))

    # --- What the owner reports ---

    def computed(self, number: int, size_bytes: int) -> None:
        """Report that a job's output is ready."""
        self._say(number, _State.RUNNING, Computed(self.epoch, number, size_bytes), ())

    def finished(self, number: int, frames: Sequence[bytes]) -> None:
        """Report that the last job of a request is done."""
        self._say(number, _State.RUNNING, Finished(self.epoch, number), tuple(frames))

    def failed(self, number: int, text: str, retryable: bool) -> None:
        """Report that a job failed."""
        word = Failed(self.epoch, number, 0, text[:4096], retryable)
        self._say(number, _State.RUNNING, word, ())

    def pushed(self, number: int, turn: int, frames: Sequence[bytes]) -> None:
        """Report that an output is there; ``frames`` is its manifest."""
        self._end_turn(number, Pushed(self.epoch, number, turn), tuple(frames))

    def push_failed(self, number: int, turn: int, text: str) -> None:
        """Report that an output is not there, and that nothing of it is being written any more."""
        self._end_turn(number, Failed(self.epoch, number, turn, text[:4096], retryable=True), ())

    def dropped(self, number: int) -> None:
        """Report that nothing is left of a job and nothing of it will be written."""
        job = self._jobs.get(number)
        if job is not None and job.state is _State.DROPPING:
            del self._jobs[number]
            self._is_over(number)
            # While it begins again the new epoch says it: who hears `Aborted` gives slots to others
            # at once, and what this engine sent late may still land there.
            if not (job.forgotten or self._resetting):
                self._send(Aborted(self.epoch, number))
            self._restart_if_idle()

    def _end_turn(self, number: int, word: Pushed | Failed, frames: Frames) -> None:
        self._say(number, _State.PUSHING, word, frames)
        job = self._jobs.get(number)
        if job is not None and job.next is not None:
            following, job.next = job.next, None
            self._push(following)

    def _say(self, number: int, state: _State, word: Any, frames: Frames) -> None:
        job = self._jobs.get(number)
        if job is not None and job.state is state:
            job.state, job.word, job.frames = _State.SAID, word, frames
            self._send(word, frames)

    # --- Slots ---

    def grant(self) -> None:
        """Grant what there is room for: call it when memory has become free."""
        if not self._resetting and not self.draining:
            granted = self._grants.made()
            if granted and self._heartbeat_s is not None:
                self._send(Granted(self.epoch, granted))

    def _is_over(self, number: int) -> None:
        self._over[number] = None
        if len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)

    def _send(self, message: Any, frames: Frames = ()) -> None:
        self._outbox.append((message, frames))
