"""Connections to other engines, one an address: made when needed, dropped when dead or unused."""

from __future__ import annotations

import collections
import contextlib
import threading
from typing import TYPE_CHECKING

from hwcore.errors import ClosedError, PeerTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwcore.diffusion.engines import Engine, Peer
    from hwcore.diffusion.engines.deadline import Deadline

__all__ = ["Peers"]

_IDLE_AT_MOST = 64


class _Entry:
    def __init__(self) -> None:
        self.connecting = threading.Lock()
        self.peer: Peer | None = None
        self.users = 0


class Peers:
    """The peers of one engine. All methods may be called from any thread.

    Parameters
    ----------
    engine : Engine
    connect_timeout_s : float
        At most so long a connection may take to be made.
    """

    def __init__(self, engine: Engine, connect_timeout_s: float) -> None:
        self._engine, self._connect_timeout_s = engine, connect_timeout_s
        self._lock = threading.Lock()
        self._entries: collections.OrderedDict[str, _Entry] = collections.OrderedDict()
        self._closed = False

    def __len__(self) -> int:
        with self._lock:
            return sum(entry.peer is not None for entry in self._entries.values())

    @contextlib.contextmanager
    def using(self, address: str, deadline: Deadline) -> Iterator[Peer]:
        """Give the peer at an address; where the block raises, one that is dead is dropped.

        Who connects elsewhere does not wait for it; who wants the same peer shares it.

        Raises
        ------
        PeerTimeoutError, PeerError, ArgumentTypeError, ArgumentValueError
            As ``Engine.connect``; also if another thread is connecting there for too long.
        ClosedError
        """
        with self._lock:
            if self._closed:
                raise _closed()
            # An address of the wrong type is refused by the engine.
            entry = self._entries.setdefault(address, _Entry())
            entry.users += 1
        failed = True
        try:
            yield self._connected(entry, address, deadline)
            failed = False
        finally:
            with self._lock:
                entry.users -= 1
            if failed:
                self.drop_dead()

    def drop_dead(self) -> None:
        """Let go of peers that are gone, whose memory may still be mapped, and of too many."""
        dropped: list[Peer | None] = []
        with self._lock:
            for address, entry in list(self._entries.items()):
                if entry.peer is not None and not entry.peer.alive:
                    dropped.append(entry.peer)  # those who use it see it fail, or have seen it
                    entry.peer = None
                if entry.peer is None and not entry.users:
                    del self._entries[address]
            idle = [address for address, entry in self._entries.items() if not entry.users]
            too_many = idle[: max(0, len(idle) - _IDLE_AT_MOST)]
            dropped += [self._entries.pop(address).peer for address in too_many]
        for peer in dropped:
            if peer is not None:
                peer.close()

    def close(self) -> None:
        """Disconnect all: writes that run fail."""
        with self._lock:
            self._closed = True
            peers = [entry.peer for entry in self._entries.values()]
            self._entries.clear()
        for peer in peers:
            if peer is not None:
                peer.close()

    def _connected(self, entry: _Entry, address: str, deadline: Deadline) -> Peer:
        with self._lock:
            if address in self._entries:
                self._entries.move_to_end(address)
            peer = entry.peer
        if peer is not None and peer.alive:
            return peer
        try:
            timeout_s = min(deadline.left_s(), self._connect_timeout_s)
        except TimeoutError:
            raise _late(address, deadline.timeout_s) from None
        if not entry.connecting.acquire(timeout=timeout_s):
            raise _late(address, timeout_s)
        try:
            self.drop_dead()
            with self._lock:
                peer = entry.peer
            if peer is None:
                peer = self._engine.connect(address, timeout_s)
                with self._lock:
                    entry.peer = peer
                    closed = self._closed
                if closed:
                    peer.close()
                    raise _closed()
            return peer
        finally:
            entry.connecting.release()


def _late(address: str, timeout_s: float) -> PeerTimeoutError:
    message = (
        f"connect: {address} was not reached for {timeout_s:g} s; expected an engine. See whether "
        f"its process is stopped or overloaded, or wait longer."
    )
    return PeerTimeoutError(message)


def _closed() -> ClosedError:
    message = (
        "DiffusionTransferManager: it was closed; expected an open one. Push before close(), or "
        "make another."
    )
    return ClosedError(message)
