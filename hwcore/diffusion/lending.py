"""A range of memory given out in leases: who has it, who waits for it, when it is free again."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_instance, check_size, check_tensor
from hwcore.activation import current_backend
from hwcore.diffusion.copying import LeaseIO
from hwcore.diffusion.layout import LARGE_ALIGNMENT
from hwcore.diffusion.leases import Lease, Using, stale
from hwcore.diffusion.table import LeaseTable, PoolStats
from hwcore.diffusion.waiting import WaitingLine, check_timeout
from hwcore.errors import ArgumentTypeError, ArgumentValueError, ClosedError, LeaseError, describe

if TYPE_CHECKING:
    from typing import Self

    from hwcore.backend import Backend

__all__ = ["LeasedMemory"]


class LeasedMemory:
    """What :class:`TransferTensorBuffer` is before it reads and writes tensors."""

    def __init__(self, memory: torch.Tensor, backend: Backend | None) -> None:
        _check_memory(memory)
        self._backend = backend or current_backend()
        self._device = memory.device
        self._lock = threading.Lock()
        self._table = LeaseTable(self._backend, memory)
        self._io = LeaseIO(self._backend, memory.device)
        self._line = WaitingLine(
            self._lock,
            self._table.settle,
            lambda size_bytes, request_id: self._table.take(self, size_bytes, request_id),
            lambda lease: self._table.leave(lease, None),
            lambda: bool(self._table.leaving),
        )
        self._is_closed = False
        self.size_bytes = self._table.allocator.size_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- Leases ---

    def allocate(self, size_bytes: int, request_id: str = "", *, timeout_s: float = 30.0) -> Lease:
        """Return a lease of ``size_bytes``, at an address that is a multiple of 64.

        Where there is no room it waits. Who came first is served first, even if there would be
        room for a smaller request behind it. Of 0 bytes there always is.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If an argument is wrong, or the pool could never hold as much.
        AllocationTimeoutError
            If there was no room in time; it says who has it.
        AllocationCancelledError, ClosedError
            If ``cancel`` or ``close`` was called meanwhile.
        """
        where = "TransferTensorBuffer.allocate"
        self._check_request(where, size_bytes, request_id)
        check_timeout(where, timeout_s)
        with self._lock:
            self._check_open(where)
            lease = self._take(size_bytes, request_id)
            if lease is not None:
                return lease
            return self._line.get(size_bytes, request_id, timeout_s, self._holders)

    def allocate_now(self, size_bytes: int, request_id: str = "") -> Lease | None:
        """Return a lease, or None where there is no room, or others wait for it; never wait.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ClosedError
            As :meth:`allocate`.
        """
        where = "TransferTensorBuffer.allocate_now"
        self._check_request(where, size_bytes, request_id)
        with self._lock:
            self._check_open(where)
            return self._take(size_bytes, request_id)

    def free(self, lease: Lease) -> None:
        """Give a lease back. Its range is reused when nobody can touch it any more.

        Raises
        ------
        LeaseError
            If it is another pool's, or was freed before.
        """
        where = "TransferTensorBuffer.free"
        with self._lock:
            self._check(where, lease)
            self._table.leave(lease, self._io.current_stream(lease, self._device))
            self._line.serve()

    def cancel(self, request_id: str) -> int:
        """End the waiting of a request's calls of ``allocate``; return how many there were."""
        with self._lock:
            return self._line.cancel(request_id)

    def lease(self, name: bytes) -> Lease:
        """Return the lease that a peer names by its 8 bytes.

        Raises
        ------
        LeaseError
            If there is none of that name, or no more.
        """
        where = "TransferTensorBuffer.lease"
        with self._lock:
            found = self._table.find(name) if isinstance(name, bytes) else None
            if found is None or found._freed:
                raise stale(where, name)
            return found

    def leases(self, request_id: str | None = None) -> list[Lease]:
        """Return the leases that are not freed, of a request or of all."""
        with self._lock:
            return [
                lease
                for lease in self._table.live.values()
                if not lease._freed and request_id in (None, lease.request_id)
            ]

    def untracked(self, lease: Lease, size_bytes: int | None = None) -> torch.Tensor:
        """Return a lease's range as a view that does not keep it; for its holder, while it is one.

        ``size_bytes``: only the first of its bytes, by default all.

        A tracked one (``Lease.memory``) would live on in the traceback of an error, and with it the
        range would be kept for as long as somebody has the error.
        """
        with self._lock:
            self._check("TransferTensorBuffer.untracked", lease)
            count = lease.size_bytes if size_bytes is None else min(size_bytes, lease.size_bytes)
            return self._table.memory[lease.offset : lease.offset + count]

    def sum_of(self, lease: Lease, size_bytes: int) -> int:
        """Return the checksum of a lease's first bytes, of the host; as :meth:`untracked`."""
        with self._lock:
            self._check("TransferTensorBuffer.sum_of", lease)
        return self._table.sum_of(lease, size_bytes)

    def quarantine(self, lease: Lease, holder: str) -> None:
        """Keep a lease's range from reuse until ``release``, whether the lease is freed or not.

        Call it before a peer is told that it may write, or an engine that it may read.

        Parameters
        ----------
        holder : str
            Who: the peer's session, or the push.
        """
        where = "TransferTensorBuffer.quarantine"
        check_instance(where, "holder", holder, str, "the engine's session")
        with self._lock:
            self._check(where, lease)
            lease._holders.add(holder)

    def release(self, lease: Lease | bytes, holder: str) -> None:
        """Say that a holder is done with a lease: it acknowledged, or gave up for certain.

        Raises
        ------
        LeaseError
            If it does not hold the lease, or not any more.
        """
        where = "TransferTensorBuffer.release"
        with self._lock:
            name = bytes(lease) if isinstance(lease, (Lease, bytes)) else b""
            found = self._table.find(name)
            if found is None or holder not in found._holders:
                expected = f"a lease of this pool that {holder!r} holds"
                fix = "Release once what `quarantine` named"
                raise LeaseError(describe(where, "lease", lease, expected, fix))
            found._holders.discard(holder)
            self._line.serve()

    def release_all(self, holder: str) -> int:
        """Release all that a holder has, for it is known to be dead; return how many there were."""
        with self._lock:
            held = [lease for lease in self._table.live.values() if holder in lease._holders]
            for lease in held:
                lease._holders.discard(holder)
            self._line.serve()
            return len(held)

    def stats(self) -> PoolStats:
        """Return how full the pool is."""
        with self._lock:
            return self._table.stats(len(self._line))

    def close(self, timeout_s: float = 10.0) -> None:
        """Refuse new leases, end the waiting of all, and wait until no range is in use.

        Raises
        ------
        ClosedError
            If something is after ``timeout_s``; it says what. The pool stays closed, the memory
            must stay, and ``close`` may be called again.
        """
        check_timeout("TransferTensorBuffer.close", timeout_s)
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._is_closed = True
            self._line.close()
        while True:
            with self._lock:
                self._table.settle()
                if not self._table.live:
                    return
                # Nobody frees a lease that is waited for here, unless another thread does.
                if time.monotonic() >= deadline:
                    message = (
                        f"TransferTensorBuffer.close: got {self._holders()} after {timeout_s:g} s; "
                        f"expected no range in use. Free the leases and drop the views, then close "
                        f"again before the memory goes."
                    )
                    raise ClosedError(message)
            time.sleep(1e-3)

    def _using(self, where: str, lease: Lease) -> Using:
        """Return a lease's memory, alone with it; while it is held the range is not reused."""
        with self._lock:
            self._check(where, lease)
            return Using(lease, self._table.base(lease))

    def _take(self, size_bytes: int, request_id: str) -> Lease | None:
        """Return a lease where there is room and nobody else waits; the lock is held."""
        if size_bytes and len(self._line):
            return None
        self._table.settle()
        return self._table.take(self, size_bytes, request_id)

    def _check_request(self, where: str, size_bytes: int, request_id: str) -> None:
        fix = "Allocate manifest.size_bytes, or what the peer asks for"
        check_size(where, "size_bytes", size_bytes, 0, fix)
        check_instance(where, "request_id", request_id, str, "the request's router, or none")
        if size_bytes > self.size_bytes:
            expected = f"at most {self.size_bytes}, all that the pool has"
            fix = "Make the pool larger, or send the request in parts"
            raise ArgumentValueError(describe(where, "size_bytes", size_bytes, expected, fix))

    def _check(self, where: str, lease: Lease) -> None:
        check_instance(where, "lease", lease, Lease, "allocate()")
        if lease._pool is not self or lease._freed:
            raise stale(where, lease)

    def _check_open(self, where: str) -> None:
        if self._is_closed:
            message = (
                f"{where}: the pool is closed; expected an open one. "
                f"Allocate before close(), or make another pool."
            )
            raise ClosedError(message)

    def _holders(self) -> str:
        """Say who has the pool; the largest first."""
        now, free = time.monotonic(), self._table.allocator.stats()
        leases = sorted(self._table.live.values(), key=lambda lease: -lease.size_bytes)
        said = [
            f"{it.size_bytes} bytes of {it.request_id!r} for {now - it._since:.1f} s"
            + (f" (freed; {self._table.waits_for(it)})" if it._freed else "")
            for it in leases[:5]
        ]
        more = f" and {len(leases) - 5} more" if len(leases) > 5 else ""
        room = f"{free.free_bytes} bytes free, {free.largest_free_bytes} of them in one piece"
        return f"{room}, {len(leases)} leases: {', '.join(said) or 'none'}{more}"


def _check_memory(memory: torch.Tensor) -> None:
    where = "TransferTensorBuffer"
    check_tensor(where, "memory", memory, (torch.uint8,), [("size_bytes", None)])
    if memory.is_inference():
        fix = "Make it outside of torch.inference_mode()"
        raise ArgumentTypeError(describe(where, "memory", "an inference tensor", "another", fix))
    misplaced = memory.data_ptr() % LARGE_ALIGNMENT or memory.storage_offset() % LARGE_ALIGNMENT
    if not memory.is_contiguous() or misplaced or memory.numel() < LARGE_ALIGNMENT:
        got = f"{memory.numel()} bytes at {memory.data_ptr():#x}, stride {memory.stride(0)}"
        expected = f"{LARGE_ALIGNMENT} or more, in one piece, at a multiple of {LARGE_ALIGNMENT}"
        fix = "Map whole pages, or let torch.empty() allocate it"
        raise ArgumentValueError(describe(where, "memory", got, expected, fix))
