"""A race in words: both accesses, where the tensor came from, and the edge that is missing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from hwcore.errors import HwcoreError
from hwcore.testing.sanitizer.stacks import lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.testing.sanitizer.clocks import Lane
    from hwcore.testing.sanitizer.history import History, Record
    from hwcore.testing.sanitizer.stacks import Stack

__all__ = [
    "Access",
    "Kind",
    "Race",
    "RaceError",
    "RaceWarning",
    "SanitizerError",
    "origin",
    "report",
    "summary",
]

Kind = Literal[
    "read after write",
    "write after read",
    "write after write",
    "freed while in use",
    "host read before copy",
    "host write before copy",
    "pinned memory freed before copy",
]

HOST = "the host"


class SanitizerError(HwcoreError, RuntimeError):
    """The sanitizer was switched on twice, or asked about what it cannot know."""


class RaceError(HwcoreError, RuntimeError):
    """Two accesses to the same bytes are not ordered.

    Attributes
    ----------
    race : Race
    """

    def __init__(self, race: Race) -> None:
        super().__init__(str(race))
        self.race = race

    def __reduce__(self) -> tuple[type[RaceError], tuple[Race]]:
        return (type(self), (self.race,))


class RaceWarning(RuntimeWarning):
    """Two accesses are not ordered, a wait was for nothing, or some accesses are unknown."""


@dataclasses.dataclass(frozen=True)
class Access:
    """One side of a race.

    Attributes
    ----------
    stream : str
        Its name, or ``"the host"``.
    op : str
        Such as ``"aten::add"``, a kernel's name, or ``"free"``.
    write : bool
    stack : tuple of str
        ``file:line in function``, innermost first.
    origin : str
        Shape, dtype and birthplace of the tensor.
    captured : tuple of str
        For a graph's access: where it was captured; ``stack`` is the replay's.
    """

    stream: str
    op: str
    write: bool
    stack: tuple[str, ...]
    origin: str
    captured: tuple[str, ...] = ()

    @property
    def site(self) -> str:
        """The innermost line of the program, as ``file:line``."""
        return self.stack[0].rpartition(" in ")[0] if self.stack else "an unknown line"


@dataclasses.dataclass(frozen=True)
class Race:
    """Two accesses to the same bytes, the first by a stream, without an order between them.

    Attributes
    ----------
    kind : str
    current, previous : Access
        The second access in program order, at which the race was found, and the first.
    missing_edge : str
        What never waited for what, and the call that would make it.
    """

    kind: Kind
    current: Access
    previous: Access
    missing_edge: str

    def __str__(self) -> str:
        parts = [f"race: {self.kind}", f"  tensor  {self.current.origin}"]
        for title, access in (("second", self.current), ("first", self.previous)):
            verb = "write" if access.write else "read"
            what = "free" if access.op == "free" else f"{verb} by {access.op}"
            parts.append(f"  {title:<7} {what} on {access.stream}")
            parts.extend(f"            {line}" for line in access.stack)
            if access.captured:
                parts.append("          captured at")
                parts.extend(f"            {line}" for line in access.captured)
        parts.append(f"  missing {self.missing_edge}")
        parts.append("          (seen are waits through the backend's hooks, not a stream's own.)")
        return "\n".join(parts)


def report(
    kind: Kind,
    history: History,
    lane: Lane | None,
    current: tuple[str, bool, Stack, Stack],
    previous: Record,
) -> Race:
    """Put a race into words.

    Parameters
    ----------
    lane : Lane or None
        The stream of the second access; None: the host.
    current : tuple
        Op, whether it writes, stack and captured stack of the second access.
    """
    tensor = origin(history)
    op, write, stack, captured = current
    second = Access(
        stream=f"`{lane.name}`" if lane else HOST,
        op=op,
        write=write,
        stack=lines(stack),
        origin=tensor,
        captured=lines(captured),
    )
    first = Access(
        stream=f"`{previous.lane.name}`",
        op=previous.op,
        write=previous.write,
        stack=lines(previous.stack),
        origin=tensor,
        captured=lines(previous.captured),
    )
    return Race(kind, second, first, _missing_edge(kind, lane, previous.lane, first, second))


def summary(races: Sequence[Race]) -> str:
    """Return races as one text, with their number on top."""
    count = f"{len(races)} race{'s' * (len(races) != 1)}" if races else "no races"
    return "\n".join([f"hwcore race sanitizer: {count}", *map(str, races)])


def _missing_edge(
    kind: Kind, lane: Lane | None, producer: Lane, first: Access, second: Access
) -> str:
    name = producer.name
    after = f"after {first.op} at {first.site}"
    if lane is None:
        edge = f"{HOST} never waited for `{name}` {after}."
        if kind == "pinned memory freed before copy":
            fix = f"Keep the tensor until an event recorded on {name} after the copy was reached"
            return f"{edge} {fix} (backend.query_event or synchronize_event)."
        fix = f"Call backend.synchronize_stream({name}), or synchronize_event on an event recorded"
        return f"{edge} {fix} after the copy, before {second.site}."
    edge = f"`{lane.name}` never waited for `{name}` {after}."
    if kind == "freed while in use":
        fix = f"Call backend.record_stream(tensor, {name}), or backend.wait_stream"
        return f"{edge} {fix}({lane.name}, {name}), before the tensor is freed at {second.site}."
    return f"{edge} Call backend.wait_stream({lane.name}, {name}) before {second.site}."


def origin(history: History) -> str:
    """Return shape, dtype and birthplace of a tensor."""
    shape = f"{list(history.shape)} {str(history.dtype).removeprefix('torch.')}"
    if not history.made_by:
        return f"{shape}, made before the sanitizer looked"
    where = lines(history.made_at)
    stream = f" on `{history.lane.name}`" if history.lane else ""
    return f"{shape}, made by {history.made_by}{stream} at {where[0] if where else 'unknown'}"
