"""A pool's ranges and who has them: taken, freed, and reused when nobody can touch them."""

from __future__ import annotations

import dataclasses
import secrets
from typing import TYPE_CHECKING

import torch
import xxhash
from torch.multiprocessing.reductions import StorageWeakRef

from hwcore.diffusion.allocator import RangeAllocator
from hwcore.diffusion.checksum import memoryview_of
from hwcore.diffusion.host import is_sanitized, tell_sanitizer
from hwcore.diffusion.leases import GENERATIONS, Lease, identity_of

if TYPE_CHECKING:
    from hwcore.backend import Backend
    from hwcore.diffusion.allocator import AllocatorStats
    from hwcore.diffusion.lending import LeasedMemory
    from hwcore.types import Event, Stream

__all__ = ["LeaseTable", "PoolStats"]


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
        self._bytes = memoryview_of(memory) if memory.is_cpu else memoryview(b"")
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
            self._generations.append(secrets.randbelow(GENERATIONS))  # so that none can be guessed
        identity = slot, self._generations[slot]
        lease = self.live[slot] = Lease(pool, identity, offset, size_bytes, request_id)
        return lease

    def find(self, name: bytes) -> Lease | None:
        """Return the lease, or the freed one whose memory is not free yet, of that name."""
        identity = identity_of(name)
        lease = None if identity is None else self.live.get(identity[0])
        return lease if lease is not None and lease._identity == identity else None

    def base(self, lease: Lease) -> torch.Tensor:
        """Return a lease's memory, a tensor with a storage of its own.

        The storage begins and ends with the range, so that its life tells of views, and no view
        reaches beyond.
        """
        if lease._base is None:
            if torch.is_inference_mode_enabled():  # it could be written in that mode alone
                with torch.inference_mode(False):
                    lease._base = self._range(lease)
            else:
                lease._base = self._range(lease)
        return lease._base

    def _range(self, lease: Lease) -> torch.Tensor:
        if self._bytes and lease.size_bytes:  # in one call
            return torch.frombuffer(
                self._bytes, dtype=torch.uint8, count=lease.size_bytes, offset=lease.offset
            )
        made = torch.empty(0, dtype=torch.uint8, device=self.memory.device)
        if lease.size_bytes:
            start = self.memory.storage_offset() + lease.offset
            made.set_(self.memory.untyped_storage()[start : start + lease.size_bytes])
        return made

    def sum_of(self, lease: Lease, size_bytes: int) -> int:
        """Return the checksum of a lease's first bytes, in memory of the host."""
        place = slice(lease.offset, lease.offset + size_bytes)
        if is_sanitized():
            tell_sanitizer("checksum", [self.memory[place]])
        return xxhash.xxh3_64_intdigest(self._bytes[place])

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
            self._generations[slot] = (self._generations[slot] + 1) % GENERATIONS
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
