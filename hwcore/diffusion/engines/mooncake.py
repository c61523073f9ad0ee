"""Mooncake's Transfer Engine, for many hosts and for networks that sockets do not use well.

Mooncake listens on **all** interfaces of the machine, on two ports, without any authentication,
whatever host it is given: whoever reaches them can write into the pool. What hwcore adds is a
connection of its own beside Mooncake's: it authenticates both sides before one hears where the
other's pool lies, and its end says that a peer is gone. It guards no port of Mooncake's; a network
namespace or a firewall does.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from hwcore.diffusion.engines import forks, mooncake_library
from hwcore.diffusion.engines.handshake import Session, Welcome, accept, welcome
from hwcore.diffusion.engines.host import HostEngine, Settings
from hwcore.diffusion.engines.listener import Listener
from hwcore.diffusion.engines.memory import HostMemory, check_pool_size
from hwcore.diffusion.engines.peer import CUT_SHORT, HostPeer, reaching
from hwcore.diffusion.engines.tcp import dialled, listening
from hwcore.diffusion.engines.watch import Watch

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from hwcore.diffusion.engines.deadline import Deadline

__all__ = ["MooncakeEngine", "MooncakePeer"]

_log = logging.getLogger("hwcore")
_BOUNCE_BYTES = 8 * 1024 * 1024
_SPIN_S = 200e-6  # a small write is done before anything else would be
_YIELD_S = 2e-3  # one of some MiB is done before a sleep would be, on busy cores
_SLEEP_S = 50e-6
_LINGER_S = 1.0
"""How long bytes of a dead writer may still be on their way in: they have their own connection."""

_STALL_S = 0.5
"""A write that failed after as long as this was not refused: some of it may be under way."""

_leaked: list[object] = []


class _Abandoned(NamedTuple):
    """A batch that nobody waits for any more, and what stays until it has ended.

    ``connection``, whose end tells the receiver that nothing comes any more, and what is read.
    """

    batch: int
    holder: object
    connection: socket.socket


class MooncakeEngine(HostEngine):
    """A pool registered with Mooncake; see :class:`Engine`.

    Raises
    ------
    CapabilityError
        If Mooncake or a library of its is not installed, or it cannot be set up.
    ArgumentValueError
        As for the engine tcp.
    """

    name = "mooncake"

    def __init__(self, settings: Settings) -> None:
        with contextlib.ExitStack() as undo:
            module = mooncake_library.load(settings.package)
            sock, place = listening(settings)
            undo.callback(sock.close)
            check_pool_size(settings.size_bytes)
            memory = HostMemory(settings.size_bytes)
            undo.callback(memory.release)
            host = sock.getsockname()[0]
            self.library = mooncake_library.MooncakeLibrary(
                module, host, settings.protocol, settings.device
            )
            undo.callback(self.library.close)
            self.library.register(memory.address, memory.tensor.numel())
            self._facts = Welcome(settings.size_bytes, self.library.segment, memory.address)
            self._abandoned: list[_Abandoned] = []
            super().__init__(settings, memory)
            self._address = f"mooncake:{place}"
            self._listener = Listener(self.name, sock, settings.max_peers, self._serve)
            undo.pop_all()
        _log.warning(
            "mooncake: listens on all interfaces of this machine without authentication; keep its "
            "ports from others by a network namespace or a firewall"
        )

    def _serve(self, connection: socket.socket) -> None:
        session = accept(connection, self._settings.token, self.name, self.id)
        with self._writer(session), Watch(connection) as watch:
            welcome(connection, session, self._facts)
            watch.gone(-1)
            if not self._closed:
                time.sleep(_LINGER_S)

    def _dialers(self) -> Mapping[str, Callable[[str, Deadline], HostPeer]]:
        return {"mooncake": self._dial}

    def _dial(self, place: str, deadline: Deadline) -> MooncakePeer:
        self._let_go_of_ended()
        address = f"mooncake:{place}"
        sock, facts = dialled(self.name, place, self.id, self._settings.token, deadline)
        try:
            with reaching(address, deadline):
                self.library.reach(facts[1].segment, deadline)
            return MooncakePeer(self, address, sock, facts)
        except BaseException:
            sock.close()
            raise

    def holds(self, address: int, size_bytes: int) -> bool:
        """Say whether memory lies in the pool, which Mooncake may read."""
        start = self._memory.address
        return start <= address and address + size_bytes <= start + self.size_bytes

    def abandon(self, batch: int, holder: object, sock: socket.socket) -> None:
        """Keep what a batch reads that nobody waits for any more, and its peer's connection."""
        connection = sock.dup()
        forks.close_in_children(connection)
        with self._lock:
            self._abandoned.append(_Abandoned(batch, holder, connection))

    def _let_go_of_ended(self) -> int:
        """Close the connections of abandoned batches that have ended; return how many have not."""
        with self._lock:
            abandoned, self._abandoned = self._abandoned, []
            for one in abandoned:
                if self.library.landed(one.batch) is None:
                    self._abandoned.append(one)
                else:
                    one.connection.close()
            return len(self._abandoned)

    def _close_transport(self) -> None:
        end = time.monotonic() + mooncake_library.PROGRESS_S + 1
        while (running := self._let_go_of_ended()) and time.monotonic() < end:
            time.sleep(0.01)
        if running:
            # Its threads may still read: better lost memory than memory of somebody else.
            _log.error("mooncake: %d writes never ended; their memory is not given back", running)
            _leaked.extend((self.library, self._memory.tensor, self._abandoned))
            return
        self.library.unregister(self._memory.address)
        self.library.close()


class MooncakePeer(HostPeer):
    """A pool that Mooncake writes into; see :class:`Peer`.

    A source in this process's own pool goes as it is; any other is copied through registered
    memory first, in parts of 8 MiB.
    """

    _engine: MooncakeEngine

    def __init__(
        self,
        engine: MooncakeEngine,
        address: str,
        sock: socket.socket,
        facts: tuple[Session, Welcome],
    ) -> None:
        super().__init__(engine, address, sock, facts)
        self._segment, self._base = facts[1].segment, facts[1].address
        self._bounce: HostMemory | None = None

    def _write(self, source: Tensor, view: memoryview, offset: int, deadline: Deadline) -> None:
        target = self._base + offset
        if self._engine.holds(source.data_ptr(), len(view)):
            self._push(source.data_ptr(), target, len(view), deadline, source)
            return
        if self._bounce is None:
            bounce = HostMemory(_BOUNCE_BYTES)
            self._engine.library.register(bounce.address, _BOUNCE_BYTES)
            self._bounce = bounce
        for start in range(0, len(view), _BOUNCE_BYTES):
            part = source[start : start + _BOUNCE_BYTES]
            self._bounce.tensor[: part.numel()].copy_(part)
            place = target + start
            self._push(self._bounce.address, place, part.numel(), deadline, self._bounce.tensor)

    def _push(
        self, address: int, target: int, size_bytes: int, deadline: Deadline, holder: object
    ) -> None:
        """Write registered memory; once more where that failed at once: it may fail for nothing."""
        library, is_begun = self._engine.library, False
        for _ in range(2):
            started = time.monotonic()
            batch = library.submit(self._segment, address, target, size_bytes)
            is_begun = is_begun or batch is not None
            if batch is not None and self._wait(batch, deadline, holder):
                return
            if self._watch.gone():
                reason = "it is gone"
                raise self._lost(reason)
            if time.monotonic() - started > _STALL_S:
                break
        reason = "Mooncake said that it failed"
        error = self._lost(reason)
        raise self._late(deadline, reason, may_land=True) if is_begun else error

    def _wait(self, batch: int, deadline: Deadline, holder: object) -> bool:
        """Wait for a batch and say whether it landed."""
        try:
            return self._poll(batch, deadline)
        except BaseException:  # an interrupt among them: it goes on reading
            self._engine.abandon(batch, holder, self._sock)
            raise

    def _poll(self, batch: int, deadline: Deadline) -> bool:
        started = time.monotonic()
        while (landed := self._engine.library.landed(batch)) is None:
            waited_s = time.monotonic() - started
            if waited_s < _YIELD_S:
                if waited_s > _SPIN_S:
                    time.sleep(0)  # other threads may run
                continue
            if self._closed:
                raise self._lost(CUT_SHORT)
            if deadline.over:
                self._broken = CUT_SHORT
                raise self._late(deadline, "no answer", may_land=True)
            time.sleep(_SLEEP_S)
        return landed

    def _interrupt(self) -> None:
        """Nothing to do: the wait looks for it."""

    def _release(self) -> None:
        super()._release()
        bounce, self._bounce = self._bounce, None
        if bounce is not None and not self._broken:
            self._engine.library.unregister(bounce.address)
            bounce.release()
