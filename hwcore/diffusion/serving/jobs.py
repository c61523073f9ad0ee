"""What a worker knows of its jobs."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwcore.types import Event

__all__ = ["BUSY", "Job", "Phase"]


class Phase(enum.Enum):
    """Where a job is."""

    LOADING = "its input is loaded"
    READY = "waits for its turn"
    COMPUTING = "is computed"
    HELD = "its output waits for a place to go"
    PUSHING = "its output is pushed"
    SAID = "is over here"


BUSY = (Phase.LOADING, Phase.COMPUTING, Phase.PUSHING)
"""A thread is at it, and lets go of it where it is not wanted any more."""


@dataclasses.dataclass(eq=False)
class Job:
    """One request's stage on this worker.

    Attributes
    ----------
    request_id : str
    is_last : bool
        Its output is the request's result.
    prepared : object
        What ``prepare`` made of the input.
    phase, is_unwanted, output, computed, since : Phase, bool, object, Event or None, float
        The worker's own. ``computed`` is the event from which the output is there.
    """

    number: int
    request_id: str
    is_last: bool
    prepared: Any = None
    phase: Phase = Phase.LOADING
    is_unwanted: bool = False
    output: Any = None
    computed: Event | None = None
    since: float = 0.0

    @property
    def transfer_id(self) -> str:
        """What its transfers are for: a request may be here twice, once given up."""
        return f"{self.request_id} #{self.number}"
