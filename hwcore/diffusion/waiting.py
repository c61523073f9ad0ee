"""Who waits for room in a pool: first come, first served, each with a deadline."""

from __future__ import annotations

import collections
import math
import threading
import time
from typing import TYPE_CHECKING

from hwcore._checks import is_number
from hwcore.errors import (
    AllocationCancelledError,
    AllocationTimeoutError,
    ArgumentTypeError,
    ArgumentValueError,
    ClosedError,
    describe,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.diffusion.leases import Lease

__all__ = ["WaitingLine", "check_timeout"]

_LONGEST_WAIT_S = 1e6  # what a lock can wait for is limited
# Nothing tells of an event that was reached or of a view that died, so the first in line looks.
_LOOK_S = 50e-6
_LOOK_AT_LEAST_EVERY_S = 2e-3


class _Waiter:
    def __init__(self, size_bytes: int, request_id: str, lock: threading.Lock) -> None:
        self.size_bytes = size_bytes
        self.request_id = request_id
        self.woken = threading.Condition(lock)
        self.lease: Lease | None = None
        self.error: Exception | None = None


class WaitingLine:
    """Requests for room, in the order in which they came. All methods want the lock held.

    A request that does not fit keeps those behind it waiting, smaller ones as well: else a large
    one might wait for ever.

    Parameters
    ----------
    lock : threading.Lock
        The pool's.
    settle : callable
        Takes back what may be reused by now.
    take : callable
        Called with bytes and request; returns a lease, or None.
    give_back : callable
        Takes a lease back that nobody got.
    is_settling : callable
        Says whether there is something that ``settle`` may take back later.
    """

    def __init__(
        self,
        lock: threading.Lock,
        settle: Callable[[], object],
        take: Callable[[int, str], Lease | None],
        give_back: Callable[[Lease], None],
        is_settling: Callable[[], bool],
    ) -> None:
        self._lock = lock
        self._settle = settle
        self._take = take
        self._give_back = give_back
        self._is_settling = is_settling
        self._line: collections.deque[_Waiter] = collections.deque()

    def __len__(self) -> int:
        return len(self._line)

    def get(
        self, size_bytes: int, request_id: str, timeout_s: float, holders: Callable[[], str]
    ) -> Lease:
        """Return a lease when it is this request's turn and there is room.

        Raises
        ------
        AllocationTimeoutError, AllocationCancelledError, ClosedError
        """
        waiter = _Waiter(size_bytes, request_id, self._lock)
        self._line.append(waiter)
        try:
            self.serve()
            lease = self._wait(waiter, timeout_s, holders)
        except BaseException:
            if waiter.lease is not None:  # interrupted after it was served
                self._give_back(waiter.lease)
            raise
        finally:
            if waiter in self._line:
                self._line.remove(waiter)
                self.serve()  # whoever stood behind it may fit
        return lease

    def _wait(self, waiter: _Waiter, timeout_s: float, holders: Callable[[], str]) -> Lease:
        deadline, look_s = time.monotonic() + timeout_s, _LOOK_S
        while waiter.lease is None:
            if waiter.error is not None:
                raise waiter.error
            left = deadline - time.monotonic()
            if left <= 0:
                got = f"no room for {waiter.size_bytes} bytes of {waiter.request_id!r} in "
                expected = f"room, with {len(self._line)} in line and {holders()}"
                fix = "Free leases sooner, admit fewer requests, or make the pool larger"
                where = "TransferTensorBuffer.allocate"
                message = describe(where, "pool", f"{got}{timeout_s:g} s", expected, fix)
                raise AllocationTimeoutError(message)
            if self._line[0] is waiter and self._is_settling():
                left = min(left, look_s)
                look_s = min(2 * look_s, _LOOK_AT_LEAST_EVERY_S)
            waiter.woken.wait(left)
            self.serve()
        return waiter.lease

    def serve(self) -> None:
        """Give room to those whose turn it is; called whenever there may be more of it."""
        self._settle()
        while self._line:
            first = self._line[0]
            first.lease = self._take(first.size_bytes, first.request_id)
            if first.lease is None:
                first.woken.notify()  # it looks from now on
                return
            self._line.popleft()
            first.woken.notify()

    def cancel(self, request_id: str) -> int:
        """End the waiting of a request; return how many of its there were."""
        mine = [waiter for waiter in self._line if waiter.request_id == request_id]
        for waiter in mine:
            message = (
                f"TransferTensorBuffer.allocate: `{request_id}` was cancelled while it waited for "
                f"{waiter.size_bytes} bytes; expected room in the pool. Drop the request."
            )
            self._end(waiter, AllocationCancelledError(message))
        self.serve()
        return len(mine)

    def close(self) -> None:
        """End the waiting of all."""
        for waiter in list(self._line):
            message = (
                "TransferTensorBuffer.allocate: the pool was closed while a request waited; "
                "expected an open one. Cancel requests before closing."
            )
            self._end(waiter, ClosedError(message))

    def _end(self, waiter: _Waiter, error: Exception) -> None:
        self._line.remove(waiter)
        waiter.error = error
        waiter.woken.notify()


def check_timeout(where: str, timeout_s: object) -> None:
    """Raise unless ``timeout_s`` is a number of seconds that can be waited."""
    if not is_number(timeout_s):
        raise ArgumentTypeError(describe(where, "timeout_s", timeout_s, "a number", "Pass seconds"))
    if math.isnan(timeout_s) or not 0 <= timeout_s <= _LONGEST_WAIT_S:
        expected, fix = f"seconds in [0, {_LONGEST_WAIT_S:g}]", "Pass a deadline that can come"
        raise ArgumentValueError(describe(where, "timeout_s", timeout_s, expected, fix))
