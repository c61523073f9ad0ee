"""What a router knows of a request."""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
from typing import TYPE_CHECKING

from hwcore.diffusion.messages import Push, Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.diffusion.messages import Refused, Result, Slot
    from hwcore.diffusion.roles import RoleType
    from hwcore.diffusion.router.config import RouterConfig
    from hwcore.diffusion.router.outbox import Frames
    from hwcore.diffusion.router.workers import Worker

__all__ = ["Answer", "Answers", "Key", "Request", "State"]

Key = tuple[str, int]
"""A request's id and the client's attempt at it."""


class State(enum.Enum):
    """Where a request is; see the table in :mod:`hwcore.diffusion.messages`."""

    QUEUED = "waits for a worker of its first role"
    RUNNING = "a worker computes"
    COMPUTED = "its output waits for a slot of the next role"
    PUSHING = "its output is on its way"
    OVER = "its client has an answer"


@dataclasses.dataclass(eq=False)
class Request:
    """A request that is not over.

    Attributes
    ----------
    since : float
        When the state began.
    begun : float
        When the client asked.
    stages : tuple of RoleType
    stage : int
        The one that runs now.
    round : int
        How often it was begun.
    job : int
        The stage on its worker; 0 where there is none.
    turn : int
        Targets of the job's output so far.
    target, slot : Worker, Slot or None
        Where the output goes.
    input_slot : Slot or None
        Where the input lies; None where it is ``frames``.
    acknowledged : bool
        Whether the worker knows the job.
    progress : bool
        Whether its client wants to know.
    resend_at : float
        When the worker is told again.
    avoided : set of str
        Workers that had a part in what went wrong before.
    """

    key: Key
    client: str
    frames: Frames
    deadline: float
    stages: tuple[RoleType, ...]
    since: float
    begun: float
    progress: bool = False
    stage: int = 0
    round: int = 1
    state: State = State.QUEUED
    job: int = 0
    worker: Worker | None = None
    size_bytes: int = 0
    turn: int = 0
    target: Worker | None = None
    slot: Slot | None = None
    input_slot: Slot | None = None
    manifest: Frames = ()
    acknowledged: bool = False
    resend_at: float = 0.0
    avoided: set[str] = dataclasses.field(default_factory=set)

    @property
    def role(self) -> RoleType:
        """The role that runs now."""
        return self.stages[self.stage]

    @property
    def is_last(self) -> bool:
        """Whether no stage follows."""
        return self.stage + 1 == len(self.stages)

    def work(self, now: float) -> Work:
        """Return what its worker is told: to compute."""
        assert self.worker is not None
        remaining_s = max(1e-3, self.deadline - now)
        name, epoch = self.key[0], self.worker.epoch
        return Work(epoch, self.job, name, remaining_s, self.is_last, self.input_slot)

    def push(self) -> Push:
        """Return what its worker is told: to write the output to its target."""
        assert self.worker is not None
        assert self.target is not None
        assert self.slot is not None
        return Push(self.worker.epoch, self.job, self.turn, self.target.address, self.slot)

    def enter(self, state: State, now: float) -> None:
        """Change the state."""
        self.state, self.since = state, now

    def due(self, config: RouterConfig) -> float:
        """Return when something is to be done that no message asks for."""
        if self.state is State.OVER:
            return math.inf
        due = self.deadline
        if self.state is State.RUNNING:
            due = min(due, self.since + config.job_timeout_s)
            if not self.acknowledged:
                due = min(due, self.resend_at)
        elif self.state is State.PUSHING:
            due = min(due, self.since + config.push_timeout_s, self.resend_at)
        return due


@dataclasses.dataclass
class Answer:
    """What a client was told in the end."""

    client: str
    message: Result | Refused
    frames: Frames
    said_at: float
    expires: float

    @property
    def size_bytes(self) -> int:
        """What it takes to keep it."""
        return sum(map(len, self.frames))


class Answers:
    """Answers of the last while, for clients that ask again.

    Parameters
    ----------
    keep_s : float
    keep_bytes : int
        Of results. The oldest go first.
    """

    _most = 65536  # refusals take next to nothing each

    def __init__(self, keep_s: float, keep_bytes: int) -> None:
        self._keep_s, self._keep_bytes = keep_s, keep_bytes
        self._answers: collections.OrderedDict[Key, Answer] = collections.OrderedDict()
        self._bytes = 0

    def get(self, key: Key) -> Answer | None:
        """Return the answer to a request."""
        return self._answers.get(key)

    def add(
        self, key: Key, client: str, message: Result | Refused, frames: Sequence[bytes], now: float
    ) -> None:
        """Keep an answer."""
        self._drop(key)
        answer = Answer(client, message, tuple(frames), now, now + self._keep_s)
        self._answers[key] = answer
        self._bytes += answer.size_bytes
        while self._bytes > self._keep_bytes or len(self._answers) > self._most:
            self._drop(next(iter(self._answers)))

    @property
    def due(self) -> float:
        """When the next answer has been kept long enough."""
        first = next(iter(self._answers.values()), None)
        return math.inf if first is None else first.expires

    def expire(self, now: float) -> None:
        """Let go of what has been kept long enough."""
        while self._answers:
            key, answer = next(iter(self._answers.items()))
            if answer.expires > now:
                return
            self._drop(key)

    def _drop(self, key: Key) -> None:
        answer = self._answers.pop(key, None)
        if answer is not None:
            self._bytes -= answer.size_bytes
