"""Leases of a pool's memory: from allocation until nobody can touch the bytes any more."""

from __future__ import annotations

import functools
import struct
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hwcore._checks import check_size
from hwcore.errors import ArgumentValueError, LeaseError, describe

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    from hwcore.diffusion.lending import LeasedMemory
    from hwcore.fence import StreamFence
    from hwcore.types import Event, Stream

__all__ = ["GENERATIONS", "Lease", "Using", "identity_of", "lets_go", "stale", "too_small"]

P = ParamSpec("P")
T = TypeVar("T")

_WIRE = struct.Struct("<II")
GENERATIONS = 2**31  # so that a name is an int of 63 bits, which messages hold


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


class Using:
    """A ``with`` block that has a lease's memory and the lease's lock."""

    __slots__ = ("_base", "_lease")

    def __init__(self, lease: Lease, base: torch.Tensor) -> None:
        self._lease, self._base = lease, base

    def __enter__(self) -> torch.Tensor:
        self._lease._lock.acquire()
        return self._base

    def __exit__(self, *exc: object) -> None:
        self._lease._lock.release()


def lets_go(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate what works on a lease's memory: its errors do not keep the range from reuse.

    A traceback has the frames that the error came through, and they the views that they had, for
    as long as somebody has the error.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        of_caller = sys.exc_info()[1]  # which it handles meanwhile: its frames are its own
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            _clear_frames(error, of_caller)
            raise

    return call


def _clear_frames(error: BaseException, but: BaseException | None) -> None:
    """Clear the frames that have ended of an error, and of all that it came from."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set() if but is None else {id(but)}
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            left += one.__cause__, one.__context__  # the latter is there after "from None" too


def identity_of(name: bytes) -> tuple[int, int] | None:
    """Return slot and generation of a lease by its name; None where that cannot be one."""
    return _WIRE.unpack(name) if len(name) == _WIRE.size else None


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
