"""Leases of a pool's memory: from allocation until nobody can touch the bytes any more."""

from __future__ import annotations

import dataclasses
import secrets
import struct
import threading
import time
from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hwcore._checks import check_size
from hwcore.diffusion.allocator import RangeAllocator
from hwcore.errors import ArgumentValueError, LeaseError, describe

if TYPE_CHECKING:
    from types import TracebackType

    from hwcore.backend import Backend
    from hwcore.diffusion.allocator import AllocatorStats
    from hwcore.diffusion.lending import LeasedMemory
    from hwcore.fence import StreamFence
    from hwcore.types import Event, Stream

__all__ = ["Lease", "LeaseTable", "PoolStats", "stale", "too_small"]

_WIRE = struct.Struct("<II")
_GENERATIONS = 2**31  # so that a name is an int of 63 bits, which messages hold


class Lease:
    """A range of a pool's memory, owned until it is freed; use it in a ``with`` block.

    Made by ``TransferTensorBuffer.allocate``. The pool holds its leases: one that is dropped
    without being freed keeps its memory, for a peer may have been told of it.

    Attributes
    ----------
    request_id : str
    offset, size_bytes : int
        The range within the pool's memory. The size is as it was asked for.
    written_bytes : int
        Bytes from the start that were written for this lease, padding included; the rest is
        what an earlier tenant left.
    """

    def __init__(
        self,
        pool: LeasedMemory,
        identity: tuple[int, int],
        offset: int,
        size_bytes: int,
        request_id: str,
    ) -> None:
        self.request_id = request_id
        self.offset = offset
        self.size_bytes = size_bytes
        self.written_bytes = 0
        self._pool = pool
        self._identity = identity
        self._since = time.monotonic()
        self._freed = False
        self._holders: set[str] = set()
        self._streams: dict[Stream, None] = {}
        self._base: torch.Tensor | None = None
        self._views: StorageWeakRef | None = None
        self._events: list[Event] | None = None
        self._written: Event | None = None  # by a stream, last
        self._fence: StreamFence | None = None
        self._lock = threading.Lock()  # one call at a time

    def __repr__(self) -> str:
        return f"<Lease of {self.size_bytes} bytes at {self.offset} for {self.request_id!r}>"

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._freed:
            self._pool.free(self)

    def __bytes__(self) -> bytes:
        """Return the lease's name for other processes: 8 bytes, good until it is freed."""
        return _WIRE.pack(*self._identity)

    @property
    def memory(self) -> torch.Tensor:
        """The whole range, uint8, [size_bytes], for whoever fills it without torch.

        A view: see :class:`TransferTensorBuffer` for how long it may live.
        """
        with self._pool._using("Lease.memory", self) as base:
            return base[:]

    @property
    def payload(self) -> torch.Tensor:
        """What may be sent, uint8, [written_bytes]: nothing of an earlier tenant.

        The host has waited for the writes where the memory is the host's; elsewhere the current
        stream has.
        """
        with self._pool._using("Lease.payload", self) as base:
            self._pool._io.wait_for_writes(self, base)
            return base[: self.written_bytes]

    def record_stream(self, stream: Stream) -> None:
        """Keep the memory from reuse until what ``stream`` has when the lease ends is done.

        Needed for work through views on another stream than the one that was current when they
        were read, or when the lease is freed.
        """
        with self._pool._using("Lease.record_stream", self):
            self._streams[stream] = None

    def mark_received(self, size_bytes: int) -> None:
        """Say that a peer has written the first ``size_bytes``; reading more is an error."""
        where, fix = "Lease.mark_received", "Pass the bytes that the engine says have come"
        check_size(where, "size_bytes", size_bytes, 0, fix)
        with self._pool._using(where, self):
            if size_bytes > self.size_bytes:
                raise too_small(where, "size_bytes", size_bytes, self)
            self.written_bytes = size_bytes


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """How full a pool is.

    Attributes
    ----------
    ranges : AllocatorStats
        Bytes and fragmentation.
    live_leases, waiting_requests : int
    freed_leases, freed_bytes : int
        Freed, and not reusable yet.
    quarantined_leases : int
        Of the freed ones, those that somebody outside may still touch.
    """

    ranges: AllocatorStats
    live_leases: int
    waiting_requests: int
    freed_leases: int
    freed_bytes: int
    quarantined_leases: int


class LeaseTable:
    """A pool's ranges and who has them. Its owner has a lock.

    Parameters
    ----------
    backend : Backend
    memory : Tensor, uint8, [size_bytes]
    """

    def __init__(self, backend: Backend, memory: torch.Tensor) -> None:
        self._backend = backend
        self.memory = memory
        self.allocator = RangeAllocator(memory.numel())
        self.live: dict[int, Lease] = {}  # by slot; freed ones too, until their memory is free
        self.leaving: dict[int, Lease] = {}  # the freed ones
        self._unused: list[int] = []
        self._generations: list[int] = []

    def take(self, pool: LeasedMemory, size_bytes: int, request_id: str) -> Lease | None:
        """Return a new lease, or None while there is no room."""
        offset = self.allocator.allocate(size_bytes) if size_bytes else 0
        if offset is None:
            return None
        if self._unused:
            slot = self._unused.pop()
        else:
            slot = len(self._generations)
            self._generations.append(secrets.randbelow(_GENERATIONS))  # so that none can be guessed
        identity = slot, self._generations[slot]
        lease = self.live[slot] = Lease(pool, identity, offset, size_bytes, request_id)
        return lease

    def find(self, name: bytes) -> Lease | None:
        """Return the lease, or the freed one whose memory is not free yet, of that name."""
        if len(name) != _WIRE.size:
            return None
        slot, generation = _WIRE.unpack(name)
        lease = self.live.get(slot)
        return lease if lease is not None and lease._identity == (slot, generation) else None

    def base(self, lease: Lease) -> torch.Tensor:
        """Return a lease's memory, a tensor with a storage of its own.

        The storage begins and ends with the range, so that its life tells of views, and no view
        reaches beyond.
        """
        if lease._base is None:
            start = self.memory.storage_offset() + lease.offset
            with torch.inference_mode(False):  # else it could be written in that mode alone
                empty = torch.empty(0, dtype=torch.uint8, device=self.memory.device)
                if lease.size_bytes:
                    whole = self.memory.untyped_storage()
                    empty.set_(whole[start : start + lease.size_bytes])
            lease._base = empty
        return lease._base

    def leave(self, lease: Lease, stream: Stream | None) -> None:
        """Begin to give a lease back, which ``stream`` may still use."""
        lease._freed = True
        self.leaving[lease._identity[0]] = lease
        if stream is not None:
            lease._streams[stream] = None

    def settle(self) -> bool:
        """Take back what nobody can touch any more; say whether there was any."""
        settled = [lease for lease in self.leaving.values() if self._is_untouched(lease)]
        for lease in settled:
            slot = lease._identity[0]
            del self.live[slot], self.leaving[slot]
            self._generations[slot] = (self._generations[slot] + 1) % _GENERATIONS
            self._unused.append(slot)
            if lease.size_bytes:
                self.allocator.free(lease.offset)
        return bool(settled)

    def stats(self, waiting_requests: int) -> PoolStats:
        """Return how full the pool is."""
        self.settle()
        freed = list(self.leaving.values())
        return PoolStats(
            self.allocator.stats(),
            len(self.live) - len(freed),
            waiting_requests,
            len(freed),
            sum(lease.size_bytes for lease in freed),
            sum(bool(lease._holders) for lease in freed),
        )

    def waits_for(self, lease: Lease) -> str:
        """Say what keeps a freed lease's memory."""
        if lease._holders:
            return f"quarantined for {', '.join(sorted(lease._holders))}"
        if lease._events is None:
            return "tensors that view it"
        return "work on streams"

    def _is_untouched(self, lease: Lease) -> bool:
        if lease._holders:
            return False
        if lease._events is None:
            if self._is_viewed(lease):
                return False
            # Now, for what came through views until now is ahead of these events.
            lease._events = [self._record(stream) for stream in lease._streams]
        while lease._events and self._backend.query_event(lease._events[-1]):
            lease._events.pop()
        return not lease._events

    def _is_viewed(self, lease: Lease) -> bool:
        if lease._base is not None:
            for stream in list(lease._streams):  # a call may be at work in another thread
                if lease._base.device.type == self._backend.info.device_type:
                    self._backend.record_stream(lease._base, stream)
            storage = lease._base.untyped_storage()
            lease._views = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            lease._base = None
        if lease._views is None:
            return False
        return not lease._views.expired()  # type: ignore[no-untyped-call]

    def _record(self, stream: Stream) -> Event:
        event = self._backend.create_event(stream.device)
        self._backend.record_event(event, stream)
        return event


def stale(where: str, lease: object) -> LeaseError:
    """Return the error for what names no lease of a pool, or none any more."""
    expected = "a lease of this pool that was not freed"
    fix = "Free each once, after its last use; a peer that names another is out of date"
    return LeaseError(describe(where, "lease", lease, expected, fix))


def too_small(
    where: str, what: str, got: int, lease: Lease, limit: int | None = None
) -> ArgumentValueError:
    """Return the error for more bytes than a lease has, or than were written to it."""
    has = (
        f"{limit}, written to {lease!r}" if limit is not None else f"{lease.size_bytes}: {lease!r}"
    )
    expected, fix = f"at most {has}", "Allocate what manifest.size_bytes says, and write it first"
    return ArgumentValueError(describe(where, what, got, expected, fix))
