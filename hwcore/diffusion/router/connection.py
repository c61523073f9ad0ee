"""A connection to a router, as clients and workers have one."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from hwcore.diffusion import messages
from hwcore.diffusion.router.config import MOST_BYTES
from hwcore.diffusion.router.libraries import zmq
from hwcore.diffusion.router.security import Security
from hwcore.diffusion.router.sockets import Drops, Loop, as_name, new_socket, send
from hwcore.errors import ArgumentTypeError, ArgumentValueError, PeerError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.diffusion.engines.token import Token
    from hwcore.diffusion.router.security import Party

__all__ = ["Connection"]

_log = logging.getLogger("hwcore")
_SILENT_S = 3.0  # the router says something with every heartbeat


class Connection:
    """A socket to a router, its thread, and a new socket where nothing comes from the old one.

    Parameters
    ----------
    who : str
        For errors and the log.
    address : str
    token : Token
    party : str
    identity : str
        The name under which the router knows this end.
    kind : type alias
        What the router says.
    hear : callable
        Called with each message, its frames and the time, in the thread.
    turn, end : callable
        See :class:`~hwcore.diffusion.router.sockets.Loop`.
    """

    def __init__(
        self,
        who: str,
        address: str,
        token: Token,
        party: Party,
        identity: str,
        kind: object,
        hear: Callable[[Any, list[bytes], float], None],
        turn: Callable[[float], float],
        end: Callable[[], None],
    ) -> None:
        fix = "Pass letters and digits"
        if not isinstance(identity, str):
            raise ArgumentTypeError(describe(who, f"the {party}'s name", identity, "a str", fix))
        if as_name(identity.encode()) is None:
            expected = "1 to 128 letters, digits, or one of `_.:@/+-`"
            message = describe(who, f"the {party}'s name", identity, expected, fix)
            raise ArgumentValueError(message)
        self.address, self._silent_s = address, _SILENT_S
        self.drops = Drops(f"{who} {identity}")
        self._who, self._party, self._identity = who, party, identity
        self._kind, self._hear, self._owner_turn, self._owner_end = kind, hear, turn, end
        self._security = Security(token, who)
        self._heard = time.monotonic()
        self._context = zmq.Context()
        try:
            self._socket = self._connected()
        except BaseException:
            self._context.destroy(0)
            raise
        self.loop = Loop(f"hwcore-{party}-{identity}", self.drops, self._turn, self._end)
        self.loop.add(self._socket, self._receive)

    def expect(self, heartbeat_s: float) -> None:
        """Take note of how often the router says something."""
        self._silent_s = max(_SILENT_S, 4 * heartbeat_s)

    def send(self, message: Any, frames: tuple[bytes, ...] = ()) -> None:
        """Send a message, or drop it: all are said again. In the loop's thread."""
        why_not = send(self._socket, (messages.encode(message), *frames))
        if why_not:
            self.drops(why_not, f"for the router at {self.address}")

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message = messages.decode(frames[0], self._kind)
        except PeerError as error:
            self.drops("malformed", error)
            return
        self._heard = now = time.monotonic()
        self._hear(message, frames[1:], now)

    def _turn(self, now: float) -> float:
        due = self._owner_turn(now)
        if now >= self._heard + self._silent_s:
            self._connect_anew(now)
        return min(due, self._heard + self._silent_s)

    def _connected(self) -> Any:
        expected, fix = "such as tcp://127.0.0.1:5000", "Pass what the router says its address is"
        address = self.address
        if not isinstance(address, str):
            raise ArgumentTypeError(describe(self._who, "address", address, "a str", fix))
        socket = new_socket(self._context, zmq.DEALER, MOST_BYTES, self._identity)
        self._security.join(socket, self._party)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            message = describe(self._who, "address", address, expected, fix)
            raise ArgumentValueError(message) from error
        return socket

    def _connect_anew(self, now: float) -> None:
        """Give up a connection on which nothing comes.

        It may be dead; or another had the name when it was made, and then the router ignores it
        for good, even when the other one has gone.
        """
        self._heard = now
        _log.warning("%s %s: no word from the router at %s for %g s: it is not there, or another "
                     "%s has this name; connecting anew", self._who, self._identity, self.address,
                     self._silent_s, self._party)  # fmt: skip
        self.loop.remove(self._socket)
        self._socket.close(0)
        self._socket = self._connected()
        self.loop.add(self._socket, self._receive)

    def _end(self) -> None:
        self._owner_end()
        self._socket.close()
        self._context.term()
