"""Plain sockets: for processes that cannot share memory, on one machine or on several.

What is protected: who may write (the token), and where and what a frame says it writes (signed).
What is not: secrecy, and the bytes themselves against somebody on the way, whom the checksum does
not stop. Between machines use a network that is yours, or a tunnel.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING

import xxhash

from hwcore.diffusion.engines.deadline import Deadline, receive, receive_into, send
from hwcore.diffusion.engines.frames import (
    ANSWER_BYTES,
    HEADER_BYTES,
    Header,
    Status,
    answer,
    answered,
)
from hwcore.diffusion.engines.handshake import (
    Reason,
    Refused,
    Session,
    Welcome,
    accept,
    greet,
    welcome,
)
from hwcore.diffusion.engines.host import HostEngine, Settings
from hwcore.diffusion.engines.listener import Listener
from hwcore.diffusion.engines.memory import HostMemory, check_pool_size
from hwcore.diffusion.engines.peer import CUT_SHORT, HostPeer, reaching
from hwcore.errors import ArgumentValueError, CapabilityError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from hwcore.diffusion.engines.token import Token

__all__ = ["TcpEngine", "TcpPeer", "dialled", "listening"]

STALL_S = 30.0
"""How long a writer may leave a frame unfinished before its connection is dropped."""

_END_S = 0.25
"""How long a write that was too late waits for the other side to see its end."""


class TcpEngine(HostEngine):
    """A pool that peers write into through a connection; see :class:`Engine`.

    Raises
    ------
    ArgumentValueError
        If the host is not this machine's own and remote peers are not allowed, or the machine has
        not that much memory left.
    CapabilityError
        If nothing can listen there.
    """

    name = "tcp"

    def __init__(self, settings: Settings) -> None:
        with contextlib.ExitStack() as undo:
            sock, place = listening(settings)
            undo.callback(sock.close)
            check_pool_size(settings.size_bytes)
            memory = HostMemory(settings.size_bytes)
            undo.callback(memory.release)
            super().__init__(settings, memory)
            self._address = f"tcp:{place}"
            self._listener = Listener(self.name, sock, settings.max_peers, self._serve)
            undo.pop_all()

    def _serve(self, connection: socket.socket) -> None:
        _tune(connection)
        session = accept(connection, self._settings.token, self.name, self.id)
        with self._writer(session, connection):
            welcome(connection, session, Welcome(self.size_bytes))
            sequence = 0
            while self._take(connection, session.key, sequence):
                sequence += 1

    def _take(self, connection: socket.socket, key: bytes, sequence: int) -> bool:
        """Take one frame into the pool, and say whether another may follow."""
        data = bytearray(HEADER_BYTES)
        try:
            connection.settimeout(None)
            count = connection.recv_into(data)
            if not count:
                return False
            receive_into(connection, memoryview(data)[count:], Deadline("frame", STALL_S))
            header = Header.unpacked(data, key)
            if header is None:
                raise Refused(Reason.FRAME, "a header that its writer did not sign")
            if header.sequence != sequence:
                raise Refused(Reason.FRAME, f"frame {header.sequence} where {sequence} was due")
            if header.offset + header.size_bytes > self.size_bytes:
                status = Status.OUT_OF_BOUNDS
                send(connection, Deadline("frame", STALL_S), answer(sequence, status, key))
                detail = f"{header.size_bytes} bytes at {header.offset} of {self.size_bytes}"
                raise Refused(Reason.BOUNDS, detail)
            status = self._receive(connection, header)
            send(connection, Deadline("frame", STALL_S), answer(sequence, status, key))
        except TimeoutError:
            raise Refused(Reason.TIMEOUT, f"nothing came for {STALL_S} s within a frame") from None
        except EOFError:
            raise Refused(Reason.LOST, "the connection ended within a frame") from None
        except OSError as error:
            raise Refused(Reason.LOST, str(error)) from None
        return True

    def _receive(self, connection: socket.socket, header: Header) -> Status:
        """Receive a frame's bytes where they go; each part that comes has the whole stall time."""
        view = self._memory.buffer[header.offset : header.offset + header.size_bytes]
        rest = view
        connection.settimeout(STALL_S)
        while rest:
            count = connection.recv_into(rest)
            if not count:
                raise EOFError
            rest = rest[count:]
        if header.checksum not in (None, xxhash.xxh3_64_intdigest(view)):
            self._listener.count(Refused(Reason.CHECKSUM, f"of {header.size_bytes} bytes"))
            return Status.CHECKSUM
        return Status.LANDED

    def _dialers(self) -> Mapping[str, Callable[[str, Deadline], HostPeer]]:
        return {"tcp": lambda place, deadline: TcpPeer.dial(self, place, deadline, self._settings)}

    def _close_transport(self) -> None:
        """Nothing else is held."""


class TcpPeer(HostPeer):
    """A pool at the other end of a connection; see :class:`Peer`."""

    def __init__(
        self,
        engine: HostEngine,
        address: str,
        sock: socket.socket,
        facts: tuple[Session, Welcome],
        settings: Settings,
    ) -> None:
        super().__init__(engine, address, sock, facts)
        self._key = facts[0].key
        self._summed = settings.checksum
        self._sequence = 0

    @classmethod
    def dial(
        cls, engine: HostEngine, place: str, deadline: Deadline, settings: Settings
    ) -> TcpPeer:
        """Connect to ``host:port``."""
        address = f"tcp:{place}"
        sock, facts = dialled("tcp", place, engine.id, settings.token, deadline)
        return cls(engine, address, sock, facts, settings)

    def _write(self, source: Tensor, view: memoryview, offset: int, deadline: Deadline) -> None:
        summed = xxhash.xxh3_64_intdigest(view) if self._summed else None
        header = Header(self._sequence, offset, len(view), summed)
        try:
            data = self._answered(header, view, deadline)
        except BaseException:  # an interrupt among them: there is no way back from mid-frame
            self._broken = self._broken or CUT_SHORT
            raise
        status = answered(data, header.sequence, self._key)
        if status in (Status.LANDED, Status.CHECKSUM):  # both leave it ready for the next frame
            self._sequence += 1
        if status is Status.CHECKSUM:
            reason = "the bytes that landed have another checksum"
            raise self._failed(reason)
        if status is not Status.LANDED:
            reason = "it refused the frame" if status else "an answer that it did not sign"
            raise self._lost(reason)

    def _answered(self, header: Header, view: memoryview, deadline: Deadline) -> bytes:
        """Send a frame and return the answer to it."""
        try:
            send(self._sock, deadline, header.packed(self._key), view)
            return receive(self._sock, ANSWER_BYTES, deadline)
        except (EOFError, ConnectionError) as error:
            reason = f"the connection broke ({error or 'end of data'})"
            raise self._lost(reason) from error
        except OSError as error:  # late; or the network is silent, and what it has may still come
            if self._closed:
                raise self._lost(CUT_SHORT) from error
            said = "" if type(error) is TimeoutError and error.errno is None else f" ({error})"
            may_land = not self._ended()
            raise self._late(deadline, f"no answer{said}", may_land=may_land) from error

    def _ended(self) -> bool:
        """End the connection; say whether the other side has taken all that it will ever take.

        What lies in its buffers it reads, and lands, before it sees the end and closes. A reset
        says as much: there is no reader any more. All else, such as a silent network, says nothing.
        """
        deadline = Deadline("write", _END_S)
        try:
            self._sock.shutdown(socket.SHUT_WR)
            while True:
                self._sock.settimeout(deadline.left_s())
                if not self._sock.recv(ANSWER_BYTES):
                    return True
        except ConnectionError:
            return True
        except OSError:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            return False


def listening(settings: Settings) -> tuple[socket.socket, str]:
    """Return a socket that listens at the host of the settings, and ``host:port`` of it."""
    what, host = "`host`", settings.host
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        family, _, _, _, place = found[0]
        address = ipaddress.ip_address(str(place[0]).partition("%")[0])
        if address.is_unspecified:
            expected = "an address that peers can reach, for it is given to them"
            fix = "Pass this machine's own address in the network of the peers"
            raise ArgumentValueError(describe("open_engine", what, host, expected, fix))
        if not address.is_loopback and not settings.allow_remote:
            expected = "an address of this machine alone, such as 127.0.0.1"
            fix = "Pass allow_remote=True if the network is yours: writers are authenticated, but"
            fix += " nothing is encrypted"
            raise ArgumentValueError(describe("open_engine", what, host, expected, fix))
        sock = socket.create_server((str(place[0]), 0), family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        message = (
            f"tcp: the system said `{error}` of a socket at {host!r}; expected one that listens. "
            f"Pass an address of this machine as host."
        )
        raise CapabilityError(message) from error
    port = sock.getsockname()[1]
    return sock, f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def dialled(
    engine: str, place: str, own_id: str, token: Token, deadline: Deadline
) -> tuple[socket.socket, tuple[Session, Welcome]]:
    """Return a connection to ``host:port`` and what its engine said of itself."""
    address = f"{engine}:{place}"
    host, _, port = place.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        fix = "Pass the other engine's .address"
        expected = f"{engine}:HOST:PORT"
        raise ArgumentValueError(describe("connect", "`address`", address, expected, fix))
    with reaching(address, deadline):
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=deadline.left_s())
    try:
        _tune(sock)
        session, facts, _ = greet(sock, token, engine, own_id, address, deadline)
    except BaseException:
        sock.close()
        raise
    return sock, (session, facts)


def _tune(sock: socket.socket) -> None:
    """No waiting for more to send; a machine that vanished is noticed after half a minute."""
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 10),
        (socket.TCP_KEEPINTVL, 5),
        (socket.TCP_KEEPCNT, 4),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
