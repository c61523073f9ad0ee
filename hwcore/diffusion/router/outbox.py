"""What a router's mind has to say, and when it has to look at the clock again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

__all__ = ["Frames", "Observer", "Outbox", "Sent"]

Frames = tuple[bytes, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """A message to a client or a worker, by the name that it came under."""

    to: str
    message: Any
    frames: Frames = ()


class Outbox:
    """Messages in the order in which they are to be sent.

    Attributes
    ----------
    due : float
        The earliest time at which something is to be done that no message asks for.
    """

    def __init__(self) -> None:
        self.due = math.inf
        self._sent: list[Sent] = []

    def send(self, to: str, message: Any, frames: Frames = ()) -> None:
        """Add a message."""
        self._sent.append(Sent(to, message, frames))

    def by(self, when: float) -> None:
        """Look at the clock at this time, or before."""
        if when < self.due:
            self.due = when

    def take(self) -> list[Sent]:
        """Return the messages and keep none."""
        taken, self._sent = self._sent, []
        return taken


class Observer:
    """Who is told what became of requests; this one does nothing with it."""

    def stage_done(self, role: str, seconds: float) -> None:
        """Take note of a stage that was computed."""

    def pushed(self, size_bytes: int) -> None:
        """Take note of an output that has reached the next stage."""

    def begun_anew(self, reason: str) -> None:
        """Take note of a request that is begun once more."""

    def answered(self, outcome: str, seconds: float) -> None:
        """Take note of an answer: ``result``, or why there is none."""
