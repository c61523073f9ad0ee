"""Who may talk to a router: CURVE keys that only the processes of one launch can make.

The router and whoever connects prove their keys to each other, and what they say is encrypted, on
loopback too. All keys come from the launch's token: who has it can be any of them, who lacks it
none.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hwcore.diffusion.engines.token import Token
from hwcore.diffusion.router.libraries import zmq
from hwcore.errors import ArgumentTypeError, CapabilityError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Party", "Security"]

Party: TypeAlias = Literal["client", "worker"]

_log = logging.getLogger("hwcore")


@dataclasses.dataclass(frozen=True)
class _Keys:
    """A pair in libzmq's text form. The repr does not show the secret one."""

    public: bytes
    secret: bytes = dataclasses.field(repr=False)


class Security:
    """What a launch's token lets a socket do.

    Parameters
    ----------
    token : Token
        With ``Token.off()`` sockets neither authenticate nor encrypt, which is said in the log.
    name : str
        For the log.

    Raises
    ------
    ArgumentTypeError
        If it is no token.
    CapabilityError
        If the libzmq that is installed has no CURVE.
    """

    def __init__(self, token: Token, name: str) -> None:
        if not isinstance(token, Token):
            shape = type(token).__name__  # a secret is not for a traceback
            fix = "Pass Token.from_environment(), or Token.off() to do without"
            raise ArgumentTypeError(describe(name, "`token`", shape, "a Token", fix))
        self.is_on = not token.is_off
        self._token = token
        if not self.is_on:
            _log.warning("%s: opened with Token.off(): whoever reaches it may take part", name)
        elif not zmq.has("curve"):
            message = (
                f"{name}: libzmq {zmq.zmq_version()} got no CURVE; expected a build that has it. "
                f"Install pyzmq from its wheel, or pass Token.off() where no other user is."
            )
            raise CapabilityError(message)

    def accept(self, socket: Any, party: Party) -> None:
        """Have a router's socket take connections of one party alone."""
        if self.is_on:
            keys = self._keys("router", party)
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
            socket.zap_domain = party.encode()

    def join(self, socket: Any, party: Party) -> None:
        """Have a socket connect to a router as one of a party."""
        if self.is_on:
            keys = self._keys(party, party)
            socket.curve_serverkey = self._keys("router", party).public
            socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret

    def gate(self, context: Any, refused: Callable[[], None]) -> Gate | None:
        """Return what answers libzmq's questions who may connect; None where all may."""
        parties: tuple[Party, ...] = ("client", "worker")
        keys = {party: self._keys(party, party).public for party in parties}
        return Gate(context, keys, refused) if self.is_on else None

    def _keys(self, who: str, party: Party) -> _Keys:
        from zmq.utils import z85

        secret = z85.encode(self._token.mac(b"hwcore router curve", who.encode(), party.encode()))
        return _Keys(zmq.curve_public(secret), secret)


class Gate:
    """The end of ZAP (ZeroMQ RFC 27): says which keys may connect to which socket.

    Without one, libzmq would let any key in that knows the router's.

    Parameters
    ----------
    context : zmq.Context
        Of the sockets.
    keys : mapping of str to bytes
        The one key of each socket's ``zap_domain``.
    refused : callable
        Called for each key that is not let in.

    Attributes
    ----------
    socket : zmq.Socket
        To be polled; :meth:`handle` takes what comes.
    """

    def __init__(self, context: Any, keys: dict[Party, bytes], refused: Callable[[], None]) -> None:
        from zmq.auth import Authenticator

        self._keys, self._refused = keys, refused
        self._authenticator = Authenticator(context, log=logging.getLogger("hwcore.zmq"))
        for party in keys:
            self._authenticator.configure_curve_callback(party, self)
        self._authenticator.start()
        self.socket = self._authenticator.zap_socket

    def callback(self, domain: str, key: bytes) -> bool:
        """Say whether a key may connect; called by pyzmq."""
        allowed = self._keys.get(domain) == key  # type: ignore[call-overload]
        if not allowed:
            self._refused()
        return bool(allowed)

    def handle(self, frames: list[bytes]) -> None:
        """Answer a question. It is a coroutine in pyzmq, which here has nothing to wait for."""
        answering = self._authenticator.handle_zap_message(frames)
        try:
            answering.send(None)
        except StopIteration:
            return
        finally:
            answering.close()
        message = "pyzmq's authenticator waited for something"  # not of pyzmq 26 and 27
        raise RuntimeError(message)

    def close(self) -> None:
        """Close its socket."""
        self._authenticator.stop()
