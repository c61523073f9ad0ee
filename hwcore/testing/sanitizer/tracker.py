"""The state of a sanitizer: clocks, histories, races found.

Hooks and dispatch modes feed it. Everything that changes it runs under one lock, which a thread
may take again: a finaliser that the interpreter runs in the middle may use tensors. Races are
found under the lock and delivered after it is let go, for delivering runs the user's code.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from hwcore.testing.sanitizer import stacks
from hwcore.testing.sanitizer.clocks import Clocks
from hwcore.testing.sanitizer.history import MANY_RECORDS, Histories, History, Record, region_of
from hwcore.testing.sanitizer.ranges import Span
from hwcore.testing.sanitizer.reports import Race, RaceError, RaceWarning, origin, report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwcore.backend import Backend
    from hwcore.testing.sanitizer.clocks import Lane
    from hwcore.testing.sanitizer.ranges import Region
    from hwcore.testing.sanitizer.reports import Kind
    from hwcore.testing.sanitizer.stacks import Stack

__all__ = [
    "DEVICE",
    "HOST",
    "NOWHERE",
    "Call",
    "Captured",
    "OnRace",
    "Tracker",
    "overrides_dispatch",
]

_log = logging.getLogger("hwcore")

OnRace = Literal["raise", "warn", "collect"]

DEVICE, HOST, NOWHERE = range(3)
"""Where a tensor's memory lies; a fake or sparse tensor has none that could be followed."""


class Call(NamedTuple):
    """What accesses memory: an op or kernel, and where the program called it."""

    name: str
    stack: Stack
    indexed: bool = False


Captured = dict[tuple[History, "Region", bool], Record]
"""What a graph touches: storage, bytes and whether they are written, to the first such access."""

UNSEEN = Call("", ())
"""What made a tensor that was there before the sanitizer looked."""


def overrides_dispatch(cls: type[torch.Tensor]) -> bool:
    """Say whether a class of tensors handles torch calls itself; autograd names plain ones too."""
    return cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


class _Thread(threading.local):
    """What a thread is in the middle of."""

    capture: Captured | None = None
    replay: Captured | None = None
    rows: tuple[tuple[History, Region], ...] = ()


class Tracker:
    """Compares accesses; does not know how it gets to hear of them.

    Parameters
    ----------
    backend : Backend
    on_race : {"raise", "warn", "collect"}
    """

    def __init__(self, backend: Backend, on_race: OnRace) -> None:
        self.backend = backend
        self.on_race = on_race
        self.active = False
        self.races: list[Race] = []
        self.clocks = Clocks()
        self.thread = _Thread()
        self.lock = threading.RLock()
        self.process = os.getpid()
        self.capture_executes = "capture_executes" in backend.info.quirks
        # On the host as a device nothing but pin_memory tells host memory from a device's.
        self.is_host_backend = backend.info.device_type == "cpu"
        self._freed: collections.deque[History] = collections.deque()
        self.histories = Histories(self._freed)
        self._seen: set[object] = set()
        self._reuse_waits = backend.host_memory_policy().reuse_waits_for_copy
        self._sides: dict[torch.device, int] = {}
        self._plain_types: dict[type, bool] = {torch.Tensor: True, torch.nn.Parameter: True}
        self._default_seen = False
        self._told_of_full = False

    @contextlib.contextmanager
    def changing(self) -> Iterator[list[Race]]:
        """Hold the lock; afterwards deliver the races that were put into the list."""
        found: list[Race] = []
        with self.lock:
            self._end_freed(found)
            yield found
        if found:
            self.deliver(found)

    def deliver(self, found: list[Race]) -> None:
        """Raise, warn of, or keep races. All of them are kept, whichever is raised."""
        self.races.extend(found)
        if self.on_race == "raise":
            raise RaceError(found[0])
        if self.on_race == "warn":
            for race in found:
                stacks.warn(RaceWarning(str(race)))

    # --- Where memory and work are ---

    def side(self, tensor: torch.Tensor) -> int:
        """Return :data:`DEVICE`, :data:`HOST` or :data:`NOWHERE`."""
        plain = self._plain_types.get(type(tensor))
        if plain is None:
            plain = not overrides_dispatch(type(tensor))
            self._plain_types[type(tensor)] = plain
        if not plain:
            return NOWHERE  # a subclass: the plain tensors that it holds are seen by themselves
        device = tensor.device
        side = self._sides.get(device)
        if side is None:
            own = self.backend.info.device_type
            side = DEVICE if device.type == own else HOST if device.type == "cpu" else NOWHERE
            self._sides[device] = side
        if side == DEVICE and self.is_host_backend:
            history = self.find(tensor)
            return HOST if history is not None and history.host else DEVICE
        return side

    def lane(self, device: torch.device | None = None) -> Lane:
        """Return the calling thread's current stream."""
        stream = self.backend.current_stream(device)
        with self.lock:
            lane = self.clocks.lane(stream)
            if not self._default_seen and lane.object is None:
                self._default_seen = True
                if not lane.named:
                    self.clocks.name(lane, "current")
        return lane

    def find(self, tensor: torch.Tensor) -> History | None:
        """Return the history of a tensor's storage, if it has one."""
        try:
            return self.histories.find(tensor.untyped_storage())
        except (NotImplementedError, RuntimeError):  # sparse and wrapped tensors have no storage
            return None

    def find_or_begin(
        self, tensor: torch.Tensor, lane: Lane | None = None, call: Call = UNSEEN
    ) -> History | None:
        """Return the history of a tensor's storage; None where it has no storage."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None
        history = self.histories.find(storage)
        if history is None:
            history = History(tensor, lane, call.name, call.stack)
            history.in_graph = self.thread.capture is not None
            self.histories.enter(storage, history)
        return history

    # --- Accesses ---

    def by_stream(
        self, found: list[Race], tensor: torch.Tensor, lane: Lane, write: bool, call: Call
    ) -> None:
        """Enter an access by a stream."""
        history = self.find_or_begin(tensor)
        if history is not None and tensor.numel():
            region = self._region(history, tensor, call)
            self.enter(found, history, Record(lane, region, write, call.name, call.stack))

    def enter(self, found: list[Race], history: History, record: Record) -> None:
        """Enter an access by a stream; one that is captured and not executed is only noted."""
        capture, replay = self.thread.capture, self.thread.replay
        if capture is not None:
            capture.setdefault((history, record.region, record.write), record)
            if not self.capture_executes:
                return
        if replay is not None and (history, record.region, record.write) in replay:
            return  # a graph of torch calls, entered as a whole before it ran
        if not record.region:
            return
        for old in history.add(record):
            kind: Kind = "read after write"
            if record.write:
                kind = "write after write" if old.write else "write after read"
            second = (record.op, record.write, record.stack, record.captured)
            self._report(found, kind, history, record.lane, second, old)
        if history.full and not self._told_of_full:
            self._told_of_full = True
            _log.warning(
                "race sanitizer: more than %d accesses to one tensor (%s) are not waited for by "
                "the host; the oldest are forgotten, and races with them are not reported",
                MANY_RECORDS,
                origin(history),
            )

    def by_host(
        self, found: list[Race], tensor: torch.Tensor, write: bool, op: str, indexed: bool = False
    ) -> None:
        """Check an access by the host, which whatever it launches later comes after."""
        history = self.find(tensor)
        if history is None or not history.records or not tensor.numel():
            return
        region = self._region(history, tensor, Call(op, (), indexed))
        for old in history.pending(region, write):
            kind: Kind = "host write before copy" if write else "host read before copy"
            self._report(found, kind, history, None, (op, write, stacks.capture(), ()), old)

    def allocated(self, tensor: torch.Tensor, lane: Lane | None, written: bool, call: Call) -> None:
        """Begin the history of an op's result; an undeclared alias has one already."""
        if self.find(tensor) is not None:
            return
        history = self.find_or_begin(tensor, lane, call)
        if history is not None and written and lane is not None and tensor.numel():
            self.enter([], history, Record(lane, region_of(tensor), True, call.name, call.stack))

    def resized(self, found: list[Race], tensor: torch.Tensor, lane: Lane, call: Call) -> None:
        """Enter a change of a storage's size: the contents move to other memory."""
        history = self.find_or_begin(tensor, lane, call)
        if history is None:
            return
        before, history.nbytes = history.nbytes, tensor.untyped_storage().nbytes()
        if before not in (0, history.nbytes):
            size = max(before, history.nbytes)
            everything = (Span(0, size, size, ()),)
            self.enter(found, history, Record(lane, everything, True, call.name, call.stack))

    def waited_for(self, lane: Lane) -> None:
        """Let the host know of all work in a stream."""
        if self.thread.capture is None or self.capture_executes:
            self.clocks.observe(self.clocks.release(lane))

    def pinned(self, tensor: torch.Tensor) -> None:
        """Mark a tensor's storage as host memory, nothing pending."""
        history = self.find_or_begin(tensor, None, Call("pin_memory", stacks.capture()))
        if history is not None and not history.host:
            history.host, history.lane, history.records = True, None, []

    def forget_gone_streams(self) -> None:
        """Forget streams that nothing can name any more."""
        self.clocks.forget_gone(
            lambda: (record.lane for history in self.histories for record in history.records)
        )

    def _region(self, history: History, tensor: torch.Tensor, call: Call) -> Region:
        if call.indexed:
            for annotated, region in reversed(self.thread.rows):
                if annotated is history:
                    return region
        return region_of(tensor)

    def _end_freed(self, found: list[Race]) -> None:
        """Look at what was freed since the last change: no edge has come in between."""
        kind: Kind = "freed while in use"
        while self._freed:
            history = self._freed.popleft()
            if not history.host:
                uses, kind = history.unordered_uses(), "freed while in use"
            elif self._reuse_waits:
                uses = []
            else:
                uses, kind = history.pending(None, True), "pinned memory freed before copy"
            for old in uses:
                second = ("free", True, history.freed_at, ())
                self._report(found, kind, history, history.lane, second, old)
            self.histories.remove(history)

    def _report(
        self,
        found: list[Race],
        kind: Kind,
        history: History,
        lane: Lane | None,
        second: tuple[str, bool, Stack, Stack],
        first: Record,
    ) -> None:
        pair = (kind, stacks.site(second[2]), stacks.site(first.stack))
        if pair in self._seen:
            return
        if second[2] and first.stack:  # lines that are not known need not be the same
            self._seen.add(pair)
        found.append(report(kind, history, lane, second, first))
