"""Sockets that neither block nor grow without bound, and the thread that owns them."""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any

from hwcore.diffusion.router.libraries import zmq

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Drops", "Loop", "as_name", "new_socket", "send"]

_log = logging.getLogger("hwcore")
_HIGH_WATER = 4096  # messages that wait in a socket, each way
_AT_ONCE = 256  # messages that are read from a socket before the others have their turn
_HEARTBEAT_MS, _TIMEOUT_MS = 1000, 3000  # libzmq's own, for connections whose other end is silent
_LINGER_MS = 500
_PAUSE_S = 0.05  # after a turn that failed
_NAME = re.compile(rb"[A-Za-z0-9_.:@/+-]{1,128}")


def as_name(identity: bytes) -> str | None:
    """Return a peer's identity as text, or None if it is not fit to be a name."""
    return identity.decode() if _NAME.fullmatch(identity) else None


def new_socket(context: Any, kind: int, most_bytes: int, identity: str = "") -> Any:
    """Return a socket with limits; ``most_bytes`` is that of one frame."""
    socket = context.socket(kind)
    socket.linger = _LINGER_MS
    socket.sndhwm = socket.rcvhwm = _HIGH_WATER
    socket.maxmsgsize = most_bytes
    socket.heartbeat_ivl, socket.heartbeat_timeout = _HEARTBEAT_MS, _TIMEOUT_MS
    socket.reconnect_ivl, socket.reconnect_ivl_max = 50, 1000
    if kind == zmq.ROUTER:
        socket.router_mandatory = True  # a peer that is not there is an error, not silence
    if identity:
        socket.identity = identity.encode()
    return socket


def send(socket: Any, frames: Sequence[Any]) -> str:
    """Send a message, if that can be done at once; return why not, or an empty text."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return "unread"  # by a peer that does not keep up
    except zmq.ZMQError as error:
        if error.errno != zmq.EHOSTUNREACH:
            raise
        return "absent"
    return ""


class Drops:
    """Counts of what was dropped, by reason; the 1st, 2nd, 4th, … for a reason is logged.

    Parameters
    ----------
    name : str
        For the log.
    also : callable, optional
        Told each reason.
    """

    def __init__(self, name: str, also: Callable[[str], None] | None = None) -> None:
        self._name, self._also = name, also
        self._counts: collections.Counter[str] = collections.Counter()

    def __call__(self, reason: str, detail: object = "") -> None:
        """Count one."""
        self._counts[reason] += 1
        if self._also is not None:
            self._also(reason)
        times = self._counts[reason]
        if times & (times - 1) == 0:
            _log.warning("%s: dropped a frame or connection: %s %s (%d so far)", self._name, reason,
                         str(detail)[:300], times)  # fmt: skip

    @property
    def counts(self) -> dict[str, int]:
        """How many there were."""
        return dict(self._counts)


class Loop:
    """A thread that alone uses some sockets, and does what other threads ask of it.

    Parameters
    ----------
    name : str
    drops : Drops
        Counts, as ``error``, messages whose handler raised.
    turn : callable
        Called with the time after each round of messages; returns when it wants to be called again.
    end : callable
        Called in the end, in the loop's thread.
    """

    def __init__(
        self, name: str, drops: Drops, turn: Callable[[float], float], end: Callable[[], None]
    ) -> None:
        self._name, self._drops, self._turn, self._end = name, drops, turn, end
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)
        self._handlers: dict[Any, Callable[[list[bytes]], None]] = {}
        self._lock = threading.RLock()  # a signal's handler may call, too
        self._stopping = self._ended = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._own: threading.Thread | None = None

    def add(self, socket: Any, handle: Callable[[list[bytes]], None]) -> None:
        """Read a socket. Before the start, or in the loop's thread."""
        self._handlers[socket] = handle
        self._poller.register(socket, zmq.POLLIN)

    def remove(self, socket: Any) -> None:
        """Read a socket no more."""
        del self._handlers[socket]
        self._poller.unregister(socket)

    def call(self, function: Callable[[], None]) -> bool:
        """Have the loop call a function soon; False where it has ended. From any thread."""
        with self._lock:
            if self._ended:
                return False
            self._calls.append(function)
            os.eventfd_write(self._wake, 1)
        return True

    @property
    def is_running(self) -> bool:
        """Whether somebody is there to do what :meth:`call` asks for."""
        return self._thread is not None

    @property
    def is_current(self) -> bool:
        """Whether this is the loop's own thread."""
        return self._thread is threading.current_thread()

    def start(self) -> None:
        """Run in a thread of its own."""
        self._thread = self._own = threading.Thread(target=self.run, name=self._name, daemon=True)
        self._own.start()

    def run(self) -> None:
        """Run here until :meth:`stop`."""
        self._thread = threading.current_thread()
        due = 0.0
        try:
            while not self._stopping:
                due = self._round(due)
        finally:
            self._finish()

    def stop(self) -> None:
        """End the loop, and wait until it has ended. Once is enough."""
        self._stopping = True
        if self._thread is None:
            self._finish()
            return
        self.call(lambda: None)
        if not self.is_current:
            self._over.wait()
            if self._own is not None:
                self._own.join()

    def _finish(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
            os.close(self._wake)
        try:
            for call in self._calls:  # nobody waits for an answer that does not come
                self._guarded(call)
            self._end()
        finally:
            self._over.set()

    def _round(self, due: float) -> float:
        left_s = due - time.monotonic()
        wait_ms = None if left_s == math.inf else max(0, math.ceil(left_s * 1e3))
        ready = self._poller.poll(wait_ms)
        for socket, _ in ready:
            if socket == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            else:
                self._read(socket)
        for _ in range(len(self._calls)):
            self._guarded(self._calls.popleft())
        try:
            return self._turn(time.monotonic())
        except Exception:  # noqa: BLE001 - the service goes on
            _log.exception("%s: a turn failed", self._name)
            self._drops("error")
            return time.monotonic() + _PAUSE_S

    def _read(self, socket: Any) -> None:
        handle = self._handlers.get(socket)
        if handle is None:
            return  # removed in this round
        for _ in range(_AT_ONCE):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._guarded(handle, frames)

    def _guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:  # noqa: BLE001 - one message must not end them all
            _log.exception("%s: handling a message failed", self._name)
            self._drops("error")
