"""Connections to other engines, one an address: made when needed, dropped when dead or unused."""

from __future__ import annotations

import collections
import threading
from typing import TYPE_CHECKING

from hwcore.errors import ArgumentValueError, ClosedError, PeerError, PeerTimeoutError, describe

if TYPE_CHECKING:
    from types import TracebackType

    from hwcore.diffusion.engines import Engine, Peer
    from hwcore.diffusion.engines.deadline import Deadline
    from hwcore.diffusion.messages import Slot
    from hwcore.diffusion.running import Running

__all__ = ["Peers", "Reached", "Using"]

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

    def using(self, address: str, deadline: Deadline) -> Using:
        """Give the peer at an address; where the block raises, one that is dead is dropped.

        Who connects elsewhere does not wait for it; who wants the same peer shares it.

        Raises
        ------
        PeerTimeoutError, PeerError, ArgumentTypeError, ArgumentValueError
            As ``Engine.connect``; also if another thread is connecting there for too long.
        ClosedError
        """
        return Using(self, address, deadline)

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

    def _taken(self, address: str) -> _Entry:
        """Return the entry of an address, with one user more."""
        with self._lock:
            if self._closed:
                raise _closed()
            entry = self._entries.get(address)
            if entry is None:  # an address of the wrong type is refused by the engine
                entry = self._entries[address] = _Entry()
            else:
                self._entries.move_to_end(address)
            entry.users += 1
            return entry

    def _left(self, entry: _Entry, *, has_failed: bool) -> None:
        with self._lock:
            entry.users -= 1
        if has_failed:
            self.drop_dead()

    def _connected(self, entry: _Entry, address: str, deadline: Deadline) -> Peer:
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


class Using:
    """The ``with`` block of :meth:`Peers.using`."""

    def __init__(self, peers: Peers, address: str, deadline: Deadline) -> None:
        self._peers, self._address, self._deadline = peers, address, deadline

    def __enter__(self) -> Peer:
        self._entry = self._peers._taken(self._address)
        try:
            return self._peers._connected(self._entry, self._address, self._deadline)
        except BaseException:
            self._peers._left(self._entry, has_failed=True)
            raise

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._peers._left(self._entry, has_failed=kind is not None)


class Reached:
    """The ``with`` block of who writes into a slot: gives its peer, if the slot can be there."""

    def __init__(
        self, using: Using, running: Running, where: str, address: str, slot: Slot
    ) -> None:
        self._using, self._running = using, running
        self._where, self._address, self._slot = where, address, slot

    def __enter__(self) -> Peer:
        peer = self._using.__enter__()
        slot, size_bytes = self._slot, peer.size_bytes
        if slot.offset + slot.size_bytes > size_bytes:
            self._using.__exit__(None)
            expected = f"within the {size_bytes} bytes at {self._address}"
            fix = "Pass the slot together with the address of the engine that granted it"
            raise ArgumentValueError(describe(self._where, "slot", slot, expected, fix))
        return peer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._using.__exit__(kind)
        if isinstance(error, ClosedError) and not self._running.is_closed:
            message = (
                f"{self._where}: the connection to {self._address} was dropped while this used it; "
                f"expected it to last, but another write through it failed. Send again, or to "
                f"another peer."
            )
            raise PeerError(message) from error


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
