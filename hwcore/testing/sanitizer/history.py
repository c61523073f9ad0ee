"""What was done to one storage: the accesses that later ones must still be compared with."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from hwcore.testing.sanitizer import stacks
from hwcore.testing.sanitizer.ranges import covers, overlap, span_of

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterator

    import torch

    from hwcore.testing.sanitizer.clocks import Lane
    from hwcore.testing.sanitizer.ranges import Region
    from hwcore.testing.sanitizer.stacks import Stack

__all__ = ["Histories", "History", "Record", "region_of"]

MANY_RECORDS = 256
"""Accesses of one storage beyond which the oldest are forgotten."""


class Record:
    """One access by a stream. ``captured`` is where a graph's access was captured."""

    __slots__ = ("captured", "epoch", "lane", "op", "region", "stack", "write")

    def __init__(
        self, lane: Lane, region: Region, write: bool, op: str, stack: Stack, captured: Stack = ()
    ) -> None:
        self.lane = lane
        self.epoch = lane.epoch
        self.region = region
        self.write = write
        self.op = op
        self.stack = stack
        self.captured = captured


class History:
    """One storage, from first sight until it is freed.

    Attributes
    ----------
    lane : Lane or None
        The stream that it was allocated on; None where that was not seen, or for host memory.
    host : bool
        Host memory that a device copies from or to.
    alive : bool
    in_graph : bool
        Allocated during a capture: a graph's memory is not handed to others when it is freed.
    recorded : set of Lane
        Streams that record_stream named.
    full : bool
        Accesses that may still matter had to be forgotten.
    """

    __slots__ = (
        *("alive", "dtype", "freed_at", "full", "host", "in_graph", "lane", "made_at", "made_by"),
        *("nbytes", "recorded", "records", "reference", "shape"),
    )

    def __init__(self, tensor: torch.Tensor, lane: Lane | None, made_by: str, at: Stack) -> None:
        self.lane = lane
        self.made_by = made_by
        self.made_at = at
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.nbytes = 0
        self.host = False
        self.alive = True
        self.in_graph = False
        self.full = False
        self.recorded: set[Lane] = set()
        self.records: list[Record] = []
        self.freed_at: Stack = ()
        self.reference: _Reference

    def add(self, new: Record) -> list[Record]:
        """Enter an access by a stream; return the earlier ones that it races with.

        Forgets what can no longer matter: accesses that the host has seen finished, and those
        that come before the new one and touch nothing else, for whoever is ordered after the new
        one is ordered after them.
        """
        lane, region, write = new.lane, new.region, new.write
        races: list[Record] = []
        kept: list[Record] = []
        for old in self.records:
            if old.epoch <= old.lane.host_knows:
                continue
            ordered = lane.knows(old.lane, old.epoch)
            if not ordered and (write or old.write) and overlap(old.region, region):
                races.append(old)
                ordered = True  # it has been reported, and what follows meets the new one
            if not (ordered and (write or not old.write) and covers(region, old.region)):
                kept.append(old)
        kept.append(new)
        if len(kept) > MANY_RECORDS:
            del kept[: MANY_RECORDS // 4]
            self.full = True
        self.records = kept
        return races

    def pending(self, region: Region | None, write: bool) -> list[Record]:
        """Return accesses that the host has not seen finished and that its own would race with."""
        self.records = [old for old in self.records if old.epoch > old.lane.host_knows]
        return [
            old
            for old in self.records
            if (write or old.write) and (region is None or overlap(old.region, region))
        ]

    def unordered_uses(self) -> list[Record]:
        """Return accesses that the stream which gets the memory back may not wait for."""
        if self.lane is None or self.in_graph:
            return []
        known = self.lane.knows
        return [
            old
            for old in self.records
            if old.lane not in self.recorded and not known(old.lane, old.epoch)
        ]


class _Reference(weakref.ref[Any]):
    """A weak reference to a storage that knows its history."""

    __slots__ = ("address", "history")

    address: int
    history: History


class Histories:
    """All living storages.

    They are found by the address of torch's storage object. Another object may get that address
    as soon as one is freed, and its history must not become the new one's: so a history is taken
    only if its reference still leads to the very storage that is looked up.

    Attributes
    ----------
    freed : deque of History
        Storages that died, oldest first. Filled by the interpreter whenever it frees one, maybe
        while this thread holds the sanitizer's lock: so nothing is locked and nothing looked at.
    """

    def __init__(self, freed: deque[History]) -> None:
        self.freed = freed
        self._living: dict[int, History] = {}

    def __iter__(self) -> Iterator[History]:
        return iter(list(self._living.values()))

    def __len__(self) -> int:
        return len(self._living)

    def find(self, storage: Any) -> History | None:
        """Return the history of a storage that was seen before."""
        found = self._living.get(storage._cdata)
        return found if found is not None and found.reference() is storage else None

    def enter(self, storage: Any, history: History) -> None:
        """Begin the history of a storage."""
        address = storage._cdata
        reference = _Reference(storage, self._died)
        reference.address, reference.history = address, history
        history.reference, history.nbytes = reference, storage.nbytes()
        self._living[address] = history

    def remove(self, history: History) -> None:
        """End a history; the address may be another's by now."""
        address = history.reference.address
        del history.reference  # each refers to the other
        history.alive, history.records = False, []
        if self._living.get(address) is history:
            del self._living[address]

    def _died(self, reference: weakref.ref[Any]) -> None:
        assert isinstance(reference, _Reference)
        history = reference.history
        if any(record.lane is not history.lane for record in history.records):
            history.freed_at = stacks.capture()
        self.freed.append(history)


def region_of(tensor: torch.Tensor) -> Region:
    """Return the bytes of a tensor with at least one element."""
    return (span_of(int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.itemsize),)
