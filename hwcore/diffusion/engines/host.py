"""What the engines in host memory have in common: the pool, and who writes into it."""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import logging
import os
import re
import secrets
import socket
import threading
from typing import TYPE_CHECKING, Self

from hwcore.diffusion.engines.deadline import Deadline
from hwcore.diffusion.engines.forks import check_process
from hwcore.diffusion.engines.handshake import Reason, Refused
from hwcore.errors import ArgumentTypeError, ArgumentValueError, ClosedError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from torch import Tensor

    from hwcore.diffusion.engines.handshake import Session
    from hwcore.diffusion.engines.listener import Listener
    from hwcore.diffusion.engines.memory import HostMemory
    from hwcore.diffusion.engines.peer import HostPeer
    from hwcore.diffusion.engines.token import Token
    from hwcore.types import HostRegistration

__all__ = ["HostEngine", "Settings"]

_log = logging.getLogger("hwcore")
_WRITERS_LISTED = 1024
_REFUSED_AT_MOST = 65536
_ID = re.compile(r"[0-9a-f]{16}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What :func:`~hwcore.diffusion.engines.open_engine` was told, checked."""

    size_bytes: int
    token: Token
    host: str = "127.0.0.1"
    allow_remote: bool = False
    checksum: bool = True
    max_peers: int = 64
    register: Callable[[memoryview], HostRegistration | None] | None = None
    protocol: str = "tcp"
    device: str = ""
    package: str | None = None

    def registered(self, memory: HostMemory) -> HostRegistration | None:
        """Page-lock memory for the device, where that was asked for."""
        return None if self.register is None else self.register(memory.buffer)


class HostEngine(abc.ABC):
    """An engine whose pool is host memory of this process; see :class:`Engine`."""

    name: str

    def __init__(self, settings: Settings, memory: HostMemory) -> None:
        self.id = secrets.token_hex(8)
        self.size_bytes = settings.size_bytes
        self._settings, self._memory = settings, memory
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._peers: set[HostPeer] = set()
        self._writers: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._refused: set[str] = set()
        self._to_cut: dict[str, list[socket.socket]] = {}  # connections that are all of an access
        self._listener: Listener
        self._address = ""
        self._registration = settings.registered(memory)
        if settings.token.is_off:
            _log.warning("%s: opened with Token.off(): whoever reaches it may write", self.name)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<hwcore engine {self.name} {self.id} of {self.size_bytes} bytes{state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """What a peer passes to :meth:`connect`."""
        self._check("address")
        return self._address

    @property
    def memory(self) -> Tensor:
        """The pool: uint8, [size_bytes], on the CPU."""
        self._check("memory")
        return self._memory.tensor

    @property
    def dropped(self) -> Mapping[str, int]:
        """Connections and frames that were dropped, by reason."""
        self._check("dropped")
        return self._listener.dropped

    def connect(self, address: str, timeout_s: float) -> HostPeer:
        """Return the pool of the engine at ``address``; see :class:`Engine`."""
        self._check("connect")
        deadline = Deadline("connect", timeout_s)
        if not isinstance(address, str):
            fix = "Pass the other engine's .address"
            raise ArgumentTypeError(describe("connect", "`address`", address, "a str", fix))
        scheme, _, place = address.partition(":")
        dialers = self._dialers()
        if scheme not in dialers or not place:
            expected = f"one that begins with {' or '.join(f'{name}:' for name in dialers)}"
            fix = "Pass the other engine's .address, and open engines of one kind"
            raise ArgumentValueError(describe("connect", "`address`", address, expected, fix))
        peer = dialers[scheme](place, deadline)
        with self._lock:
            closed = self._closed
            if not closed:
                self._peers.add(peer)
        if closed:
            peer.close()
            self._check("connect")
        return peer

    def writers(self) -> Mapping[str, bool]:
        """Return who connected here and whether it can still write; see :class:`Engine`."""
        self._check("writers")
        with self._lock:
            return {writer: count > 0 for writer, count in self._writers.items()}

    def refuse(self, engine_id: str) -> bool:
        """Take no connection of an engine any more; see :class:`Engine`."""
        self._check("refuse")
        if not isinstance(engine_id, str) or not _ID.fullmatch(engine_id):
            kind = ArgumentValueError if isinstance(engine_id, str) else ArgumentTypeError
            expected, fix = "16 hexadecimal digits", "Pass the other engine's .id"
            raise kind(describe("refuse", "`engine_id`", engine_id, expected, fix))
        with self._lock:
            if engine_id not in self._refused:
                if len(self._refused) >= _REFUSED_AT_MOST:
                    _log.error("%s: %s cannot be refused, %d others are; what it may write to is "
                               "lost. Open another engine.", self.name, engine_id,
                               len(self._refused))  # fmt: skip
                    return True
                self._refused.add(engine_id)
            for connection in self._to_cut.get(engine_id, ()):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            return self._writers.get(engine_id, 0) > 0

    def close(self) -> None:
        """Let go of all peers, connections, threads and files. Once is enough."""
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
            peers, self._peers = self._peers, set()
        for peer in peers:
            peer.close()
        self._listener.close()
        self._close_transport()
        if self._registration is not None:
            self._registration.close()
        self._memory.release()
        if self._memory.mapped:
            _log.info("%s: closed; %d bytes stay mapped until their last view is gone", self.name,
                      self.size_bytes)  # fmt: skip

    # --- For the engines ---

    @abc.abstractmethod
    def _dialers(self) -> Mapping[str, Callable[[str, Deadline], HostPeer]]:
        """Return how to connect, by the first word of an address."""

    @abc.abstractmethod
    def _close_transport(self) -> None:
        """Let go of what else the engine holds; nobody is connected any more."""

    @contextlib.contextmanager
    def _writer(self, session: Session, to_cut: socket.socket | None = None) -> Iterator[None]:
        """List a peer as one that can write; ``to_cut`` is the connection that is its only way."""
        writer = session.peer_id
        with self._lock:
            if writer in self._refused:  # under the lock: it is listed first, or refused first
                raise Refused(Reason.REFUSED, f"{writer} was taken for dead")
            if to_cut is not None:
                self._to_cut.setdefault(writer, []).append(to_cut)
            self._writers[writer] = self._writers.get(writer, 0) + 1
            self._writers.move_to_end(writer)
            dead = [known for known, count in self._writers.items() if not count]
            for known in dead[: max(0, len(self._writers) - _WRITERS_LISTED)]:
                del self._writers[known]
        try:
            yield
        finally:
            with self._lock:
                self._writers[writer] -= 1
                if to_cut is not None:
                    self._to_cut[writer].remove(to_cut)
                    if not self._to_cut[writer]:
                        del self._to_cut[writer]

    def forget(self, peer: HostPeer) -> None:
        """Know no more of a peer that was closed."""
        with self._lock:
            self._peers.discard(peer)

    def _check(self, what: str) -> None:
        check_process(f"{self.name} engine: {what}", self._pid)
        if self._closed:
            message = (
                f"{self.name} engine: {what}: it is closed; expected an open one. Open another."
            )
            raise ClosedError(message)
