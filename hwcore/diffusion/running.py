"""Calls that are at work for requests, so that they can be aborted and waited for."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

from hwcore.errors import ClosedError, TransferAbortedError

if TYPE_CHECKING:
    from hwcore.diffusion.pool import TransferTensorBuffer

__all__ = ["Run", "Running"]

_LOOK_S = 0.02


class Run:
    """One call that is at work for a request, from the beginning to the end of a ``with`` block."""

    def __init__(self, running: Running, where: str, request_id: str) -> None:
        self._running = running
        self.where, self.request_id = where, request_id
        self.is_aborted = self.is_cut = False

    def __enter__(self) -> Self:
        self._running.begin(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._running.end(self)

    def check(self) -> None:
        """Raise if the request was aborted, or the manager does not wait any longer."""
        if self.is_aborted:
            message = (
                f"{self.where}: {self.request_id!r} was aborted meanwhile; expected it to be "
                f"wanted until its tensors are sent. Drop the request."
            )
            raise TransferAbortedError(message)
        if self.is_cut:
            raise closed(self.where)


class Running:
    """The calls that are at work. All methods may be called from any thread.

    Parameters
    ----------
    pool : TransferTensorBuffer
        In which they may wait for room.
    """

    def __init__(self, pool: TransferTensorBuffer) -> None:
        self._pool = pool
        self._changed = threading.Condition()
        self._runs: set[Run] = set()
        self.is_closed = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._runs)

    def run(self, where: str, request_id: str) -> Run:
        """Return what counts as a call that is at work, in a ``with`` block."""
        return Run(self, where, request_id)

    def begin(self, run: Run) -> None:
        """Count a call, or raise ClosedError."""
        with self._changed:
            if self.is_closed:
                raise closed(run.where)
            self._runs.add(run)

    def end(self, run: Run) -> None:
        """Count a call no more."""
        with self._changed:
            self._runs.discard(run)
            self._changed.notify_all()

    def abort(self, request_id: str) -> set[Run]:
        """Make a request's calls fail when they next look; return them."""
        with self._changed:
            runs = {run for run in self._runs if run.request_id == request_id}
            for run in runs:
                run.is_aborted = True
        return runs

    def wait(self, runs: set[Run], timeout_s: float) -> bool:
        """Wait until calls have ended, which must not wait for room; say whether they have."""
        end = time.monotonic() + timeout_s
        while True:
            with self._changed:
                left = runs & self._runs
            # Each time: one that is about to wait for room is not in the pool's line yet.
            for request_id in {run.request_id for run in left}:
                self._pool.cancel(request_id)
            with self._changed:
                if not runs & self._runs:
                    return True
                rest_s = end - time.monotonic()
                if rest_s <= 0:
                    return False
                self._changed.wait(min(rest_s, _LOOK_S))

    def close(self, timeout_s: float) -> set[Run]:
        """Take no more, and wait for those at work; return what has not ended, to be cut short."""
        end = time.monotonic() + timeout_s
        with self._changed:
            self.is_closed = True
            while self._runs and (rest_s := end - time.monotonic()) > 0:
                self._changed.wait(rest_s)
            for run in self._runs:
                run.is_cut = True
            return set(self._runs)


def closed(where: str) -> ClosedError:
    """Return the error for a call after, or cut short by, the end."""
    message = (
        f"{where}: the manager was closed; expected an open one. Send what is to be sent before "
        f"close(), or make another manager."
    )
    return ClosedError(message)
