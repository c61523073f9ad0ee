"""Who knows of what: a vector clock for each stream, and what the host has seen finished.

A stream's work is counted in epochs. An epoch ends where others may learn of it: when an event is
recorded, when another stream or the host waits. An access is stamped with its stream's epoch, and
is ordered before later work of another stream if that stream has learned of the epoch.

The host needs no clock of its own. Whatever it launches comes after all that it has seen finished,
so what it knows is kept with the stream it is about, and counts for every stream at once. The
threads of the host count as one, in the order in which they were observed: a lock or a queue
between threads is not this package's subject.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

__all__ = ["Attached", "Clocks", "Lane", "Snapshot"]

Snapshot = dict["Lane", int]
"""Epochs by stream: what an event's waiter learns."""

V = TypeVar("V")

MANY_LANES = 64
"""Streams beyond which those that are gone are looked for and forgotten."""


class Lane:
    """One stream.

    Attributes
    ----------
    key : object
        Equal for all objects that stand for the stream.
    name : str
        For reports.
    named : bool
        The name was given; by default it is a number.
    device : torch.device
    epoch : int
        Stamp of the accesses made now.
    host_knows : int
        The host has seen every epoch up to this one finished.
    clock : dict
        Epochs of other streams that come before whatever this one does next.
    """

    __slots__ = ("clock", "device", "epoch", "host_knows", "key", "name", "named", "object")

    def __init__(self, key: object, name: str, device: torch.device) -> None:
        self.key = key
        self.name = name
        self.named = False
        self.device = device
        self.epoch = 1
        self.host_knows = 0
        self.clock: Snapshot = {}
        self.object: weakref.ref[Any] | None = None  # where this package saw it made

    def __repr__(self) -> str:
        return f"<Lane {self.name!r}>"

    def knows(self, other: Lane, epoch: int) -> bool:
        """Say whether an epoch of a stream comes before whatever this one does next."""
        return epoch <= other.host_knows or other is self or epoch <= self.clock.get(other, 0)


class Attached(Generic[V]):
    """What is known of objects of a backend's, for as long as they live.

    Those that take no weak reference (``__slots__``, types written in C), or have no hash, are held
    instead, until the sanitizer itself goes.
    """

    def __init__(self) -> None:
        self._weak: weakref.WeakKeyDictionary[Any, V] = weakref.WeakKeyDictionary()
        self._held: dict[int, tuple[Any, V]] = {}

    def __len__(self) -> int:
        return len(self._weak) + len(self._held)

    def __setitem__(self, thing: Any, value: V) -> None:
        try:
            self._weak[thing] = value
        except TypeError:
            self._held[id(thing)] = (thing, value)

    def get(self, thing: Any, default: V) -> V:
        """Return what is known of an object."""
        try:
            return self._weak.get(thing, default)
        except TypeError:
            return self._held.get(id(thing), (thing, default))[1]


class Clocks:
    """The clocks of all streams. Calls are made under the sanitizer's lock."""

    def __init__(self) -> None:
        self.lanes: dict[object, Lane] = {}
        self._events: Attached[Snapshot | None] = Attached()
        self._many = MANY_LANES

    def lane(self, stream: Any) -> Lane:
        """Return the stream's lane, a new one at first sight."""
        try:
            key: object = (stream.stream_id, stream.device)
        except AttributeError:
            key = stream
        found = self.lanes.get(key)
        if found is None:
            name = f"stream {getattr(stream, 'stream_id', len(self.lanes))}"
            device = stream.device
            if any(lane.device != device for lane in self.lanes.values()):
                name += f" on {device}"
            found = self.lanes[key] = Lane(key, name, device)
        return found

    def created(self, stream: Any, name: str | None) -> None:
        """Note a stream that was made under the sanitizer's eyes."""
        lane = self.lane(stream)
        if name:
            self.name(lane, name)
        with contextlib.suppress(TypeError):  # that of another type is never taken to be gone
            lane.object = weakref.ref(stream)

    def name(self, lane: Lane, name: str) -> None:
        """Give a stream a name for reports, with its number where the name is taken."""
        taken = any(other.name == name for other in self.lanes.values() if other is not lane)
        lane.name = f"{name} ({lane.name})" if taken else name
        lane.named = True

    # --- Edges ---

    def release(self, lane: Lane) -> Snapshot:
        """End the lane's epoch; return what whoever waits for this point learns."""
        snapshot = {**lane.clock, lane: lane.epoch}
        lane.epoch += 1
        return snapshot

    def acquire(self, lane: Lane, snapshot: Snapshot) -> None:
        """Order whatever the lane does next after a snapshot."""
        clock = lane.clock
        for other, epoch in snapshot.items():
            if other is not lane and epoch > max(clock.get(other, 0), other.host_knows):
                clock[other] = epoch

    def observe(self, snapshot: Snapshot) -> None:
        """Order whatever the host does next, on any stream, after a snapshot."""
        for other, epoch in snapshot.items():
            other.host_knows = max(other.host_knows, epoch)

    # --- Events ---

    def event_made(self, event: Any) -> None:
        """Note an event that nobody has recorded yet."""
        self._events[event] = None

    def record(self, event: Any, lane: Lane) -> None:
        """Record an event; recording it again moves it."""
        self._events[event] = self.release(lane)

    def is_unrecorded(self, event: Any) -> bool:
        """Say whether an event is known never to have been recorded."""
        return self._events.get(event, {}) is None

    def snapshot(self, event: Any) -> Snapshot:
        """Return what a waiter for the event learns now."""
        return self._events.get(event, None) or {}

    # --- Memory ---

    def forget_gone(self, referenced: Callable[[], Iterable[Lane]]) -> None:
        """Forget streams whose object is gone, once there are many, unless accesses name them."""
        if len(self.lanes) <= self._many:
            return
        used = set(referenced())
        gone = {
            lane
            for lane in self.lanes.values()
            if lane.object and lane.object() is None and lane not in used
        }
        self.lanes = {key: lane for key, lane in self.lanes.items() if lane not in gone}
        for lane in self.lanes.values():
            lane.clock = {o: e for o, e in lane.clock.items() if o not in gone}
        self._many = max(MANY_LANES, 2 * len(self.lanes))
