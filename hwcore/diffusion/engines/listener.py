"""Accept connections, a thread for each, and outlive whatever comes in."""

from __future__ import annotations

import collections
import contextlib
import logging
import socket
import threading
import time
from typing import TYPE_CHECKING

from hwcore.diffusion.engines import forks
from hwcore.diffusion.engines.handshake import Reason, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Listener"]

_log = logging.getLogger("hwcore")
_BACKOFF_S = 0.05
_JOIN_S = 5.0


class Listener:
    """A thread that accepts, and one for each connection.

    Parameters
    ----------
    name : str
        For threads and the log.
    sock : socket
        Listening; becomes the listener's.
    limit : int
        Connections at a time; one too many is closed at once and counted as ``busy``.
    serve : callable
        Called with each connection in its thread; the connection ends when it returns. What it
        raises is counted: a :class:`Refused` by its reason, anything else as ``error``.
    """

    def __init__(
        self, name: str, sock: socket.socket, limit: int, serve: Callable[[socket.socket], None]
    ) -> None:
        self._name, self._sock, self._limit, self._serve = name, sock, limit, serve
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._open: dict[threading.Thread, socket.socket] = {}
        self._closing = False
        forks.close_in_children(sock)
        self._acceptor = threading.Thread(target=self._accept, name=f"hwcore-{name}", daemon=True)
        self._acceptor.start()

    @property
    def dropped(self) -> dict[str, int]:
        """How many connections and frames were dropped, by reason."""
        with self._lock:
            return {str(reason): count for reason, count in self._counts.items()}

    def count(self, refused: Refused) -> None:
        """Count one that was dropped; the 1st, 2nd, 4th, … for a reason is logged."""
        with self._lock:
            self._counts[refused.reason] += 1
            times = self._counts[refused.reason]
        if times & (times - 1) == 0:
            _log.warning("%s: dropped a connection or frame: %s (%d so far)", self._name, refused,
                         times)  # fmt: skip

    def close(self) -> None:
        """Stop: no thread, socket or connection is left."""
        with self._lock:
            self._closing = True
            open_now = dict(self._open)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes accept()
        for connection in open_now.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        end = time.monotonic() + _JOIN_S
        for thread in (self._acceptor, *open_now):
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))
                if thread.is_alive():
                    _log.error("%s: thread %s did not end", self._name, thread.name)
        self._sock.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._sock.accept()
            except OSError as error:
                if self._closing:
                    return
                # Out of descriptors, or it went away in the queue.
                self.count(Refused(Reason.ACCEPT, str(error)))
                time.sleep(_BACKOFF_S)
                continue
            with self._lock:
                busy = self._closing or len(self._open) >= self._limit
                if not busy:
                    thread = threading.Thread(
                        target=self._run, args=(connection,), name=f"hwcore-{self._name}-peer",
                        daemon=True,
                    )  # fmt: skip
                    self._open[thread] = connection
            if busy:
                connection.close()
                self.count(Refused(Reason.BUSY, f"{self._limit} connections are open"))
                continue
            forks.close_in_children(connection)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no thread left
                with self._lock:
                    del self._open[thread]
                connection.close()
                self.count(Refused(Reason.ACCEPT, str(error)))

    def _run(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        except Refused as refused:
            if not self._closing:
                self.count(refused)
        except Exception:  # noqa: BLE001 - one connection must not end them all
            _log.exception("%s: serving a connection failed", self._name)
            with self._lock:
                self._counts[Reason.ERROR] += 1
        finally:
            with self._lock:
                self._open.pop(threading.current_thread(), None)
            with contextlib.suppress(OSError):
                connection.close()
