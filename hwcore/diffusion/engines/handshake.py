"""Who is at the other end: both sides prove that they have the launch token, before anything else.

::

    connector                                         listener
    HELLO    magic, engine, id, nonce          →
                                               ←      PROOF    id, nonce, mac("listener", …)
    CONFIRM  mac("connector", …)               →
                                               ←      WELCOME  size, mac("welcome", …), body [+ fd]

Each mac covers everything said before it. The nonces make each conversation's macs its own, so
that one that was recorded is worth nothing; the purposes make the two sides' macs differ, so that
one cannot be sent back. What comes after the handshake is signed with a key of this conversation.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import enum
import hmac
import os
import secrets
import socket
import struct
from typing import TYPE_CHECKING

import msgspec

from hwcore.diffusion.engines.deadline import Deadline, receive, send
from hwcore.diffusion.engines.token import mac
from hwcore.errors import PeerError, PeerRefusedError, PeerTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwcore.diffusion.engines.token import Token

__all__ = ["Reason", "Refused", "Session", "Welcome", "accept", "greet", "welcome"]

TIMEOUT_S = 5.0
"""How long a listener waits for a whole handshake."""

_MAGIC = b"hwcore\x00\x01"  # the last byte is the version
_HELLO = struct.Struct("!8s8s8s32s")
_PROOF = struct.Struct("!8s32s32s")
_WELCOME = struct.Struct("!H32s")
_MOST_BYTES = 1024


class Reason(enum.StrEnum):
    """Why a connection or a frame was dropped."""

    GARBAGE = "garbage"
    VERSION = "version"
    ENGINE = "engine"
    TOKEN = "token"
    UID = "uid"
    TIMEOUT = "timeout"
    LOST = "lost"
    BUSY = "busy"
    REFUSED = "refused"
    ACCEPT = "accept"
    FRAME = "frame"
    BOUNDS = "bounds"
    CHECKSUM = "checksum"
    ERROR = "error"


class Refused(Exception):
    """A listener's reason not to serve a connection; it is counted under ``reason``."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a listener says of its pool.

    Attributes
    ----------
    size_bytes : int
    segment : str
        What a transfer library calls the pool's process; empty where there is none.
    address : int
        Where the pool lies there.
    """

    size_bytes: int
    segment: str = ""
    address: int = 0


@dataclasses.dataclass(frozen=True)
class Session:
    """A conversation of which both sides are known.

    Attributes
    ----------
    peer_id : str
        The other engine's ``id``.
    key : bytes
        Signs what is said from now on.
    """

    peer_id: str
    key: bytes = dataclasses.field(repr=False)


def accept(sock: socket.socket, token: Token, engine: str, own_id: str) -> Session:
    """Go through a handshake as the listener, up to the welcome.

    Raises
    ------
    Refused
        Always with a reason, whatever came; nothing was said of the pool then.
    """
    deadline = Deadline("accept", TIMEOUT_S)
    with _refusing():
        hello = receive(sock, _HELLO.size, deadline)
        magic, wanted, peer, _ = _HELLO.unpack(hello)
        _check_hello(magic, wanted, engine)
        own = bytes.fromhex(own_id) + secrets.token_bytes(32)
        send(sock, deadline, own, token.mac(b"listener", hello, own))
        confirm = receive(sock, 32, deadline)
    if not hmac.compare_digest(confirm, token.mac(b"connector", hello, own)):
        raise Refused(Reason.TOKEN, "its token is another")
    return Session(peer.hex(), token.mac(b"session", hello, own))


def welcome(
    sock: socket.socket, session: Session, facts: Welcome, descriptors: Sequence[int] = ()
) -> None:
    """Say what the pool is, and pass descriptors: the other side can write from now on.

    Raises
    ------
    Refused
        If it is gone.
    """
    body = msgspec.json.encode(facts)
    said = _WELCOME.pack(len(body), mac(session.key, b"welcome", body)) + body
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    with _refusing():
        sock.settimeout(TIMEOUT_S)
        if sock.sendmsg([said], [rights] if descriptors else []) != len(said):
            raise EOFError


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Count what ends a handshake."""
    try:
        yield
    except TimeoutError:
        raise Refused(Reason.TIMEOUT, f"no handshake within {TIMEOUT_S} s") from None
    except (EOFError, OSError) as error:
        raise Refused(Reason.LOST, f"it left during the handshake ({error})") from None


def _check_hello(magic: bytes, wanted: bytes, engine: str) -> None:
    if magic[:-1] != _MAGIC[:-1]:
        raise Refused(Reason.GARBAGE, "no hello of hwcore")
    if magic != _MAGIC:
        detail = f"it speaks version {magic[-1]}, this is {_MAGIC[-1]}"
        raise Refused(Reason.VERSION, detail)
    if wanted != _padded(engine):
        raise Refused(Reason.ENGINE, f"it wants {wanted!r}, this is {engine}")


def greet(
    sock: socket.socket, token: Token, engine: str, own_id: str, address: str, deadline: Deadline
) -> tuple[Session, Welcome, list[int]]:
    """Go through a handshake as the one who connects.

    Returns
    -------
    (Session, Welcome, list of int)
        The descriptors are the caller's to close.

    Raises
    ------
    PeerRefusedError
        If one side has another token, or refuses.
    PeerTimeoutError, PeerError
    """
    descriptors: list[int] = []
    try:
        session, body = _greeted(sock, token, engine, own_id, address, deadline, descriptors)
        return session, msgspec.json.decode(body, type=Welcome), descriptors
    except BaseException as error:
        for fd in descriptors:
            os.close(fd)
        explained = _explained(error, address, deadline)
        if explained is None:
            raise
        raise explained from error


def _greeted(
    sock: socket.socket,
    token: Token,
    engine: str,
    own_id: str,
    address: str,
    deadline: Deadline,
    descriptors: list[int],
) -> tuple[Session, bytes]:
    """Return who is there and what it said; ``descriptors`` gets what it passed."""
    hello = _HELLO.pack(_MAGIC, _padded(engine), bytes.fromhex(own_id), secrets.token_bytes(32))
    send(sock, deadline, hello)
    peer, nonce, theirs = _PROOF.unpack(receive(sock, _PROOF.size, deadline))
    if not hmac.compare_digest(theirs, token.mac(b"listener", hello, peer + nonce)):
        with contextlib.suppress(OSError):
            send(sock, deadline, bytes(32))  # proves nothing: the other log shall say why as well
        message = (
            f"connect: {address} proved another launch token; expected this process's. Give all "
            f"processes of a launch the same token, or Token.off() to all."
        )
        raise PeerRefusedError(message)
    send(sock, deadline, token.mac(b"connector", hello, peer + nonce))
    key = token.mac(b"session", hello, peer + nonce)
    sock.settimeout(deadline.left_s())
    # Descriptors come with the first byte of what they were sent with.
    head, passed, _, _ = socket.recv_fds(sock, _WELCOME.size, 4, socket.MSG_CMSG_CLOEXEC)
    descriptors += passed
    head += receive(sock, _WELCOME.size - len(head), deadline)
    size, signed = _WELCOME.unpack(head)
    body = receive(sock, min(size, _MOST_BYTES), deadline)
    if not hmac.compare_digest(signed, mac(key, b"welcome", body)):
        message = (
            f"connect: {address} sent a welcome that it did not sign; expected one that it did. "
            f"Find out who is between the two processes."
        )
        raise PeerRefusedError(message)
    return Session(peer.hex(), key), body


def _padded(engine: str) -> bytes:
    return engine.encode().ljust(8, b"\0")


def _explained(error: BaseException, address: str, deadline: Deadline) -> PeerError | None:
    """Return the named error for what went wrong in :func:`greet`; None: it has a name."""
    if isinstance(error, PeerError) or not isinstance(error, (OSError, EOFError, ValueError)):
        return None
    if isinstance(error, TimeoutError):
        message = (
            f"connect: {address} did not answer for {deadline.timeout_s} s; expected a handshake. "
            f"See whether its process is stopped or overloaded, or wait longer."
        )
        return PeerTimeoutError(message)
    if isinstance(error, ValueError):
        message = f"connect: {address} said `{error}`; expected a pool. Use the same hwcore there."
        return PeerError(message)
    message = (
        f"connect: {address} closed the connection during the handshake ({error or 'end of data'});"
        f" expected a welcome. Its log says why: another token, another engine or version, its "
        f"limit of peers, or its end."
    )
    return PeerRefusedError(message)
