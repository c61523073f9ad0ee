"""What a worker's mind asks of its owner, and of its memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from hwcore.diffusion.messages import Slot
    from hwcore.diffusion.router.outbox import Frames

__all__ = ["Compute", "Drop", "Restart", "Slots", "Todo", "Transfer", "WorkerMemory"]


class Slots(Protocol):
    """The memory of a worker, as far as its mind needs it."""

    def grant(self, size_bytes: int) -> Slot | None:
        """Return a new slot, or None where there is no room now."""

    def consume(self, slot: Slot) -> bool:
        """Take a slot over for a job; say whether it is one that was granted and not given back."""

    def free(self, slot: Slot, writer: str) -> None:
        """Give a slot back, at once or when the engine ``writer`` can write no more.

        Twice is harmless.
        """

    def granted(self) -> list[Slot]:
        """Return the slots that hold no job."""


class WorkerMemory(Slots, Protocol):
    """A worker's pool, and the engine that others reach it by.

    Attributes
    ----------
    address, engine_id : str
        The engine's ``address`` and ``id``.
    size_bytes : int
    """

    address: str
    engine_id: str
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class Compute:
    """Do a job: its input is ``frames``, or lies in ``slot`` as the manifest in ``frames`` says."""

    job: int
    request_id: str
    frames: Frames
    slot: Slot | None
    last: bool
    remaining_s: float


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Push a job's output."""

    job: int
    turn: int
    address: str
    slot: Slot


@dataclasses.dataclass(frozen=True)
class Drop:
    """Let go of a job, then report :meth:`WorkerCore.dropped`: nothing is written after that."""

    job: int


@dataclasses.dataclass(frozen=True)
class Restart:
    """Begin again with a new pool at a new address, then report :meth:`WorkerCore.restarted`.

    Others may still write to the old pool, for the router took this worker for dead: it must not be
    the memory of anything else. What the old engine sent late may land until that is closed.
    """


Todo: TypeAlias = Compute | Transfer | Drop | Restart
