"""A router's two sockets, bound, and who may come in."""

from __future__ import annotations

import contextlib
import ipaddress
from typing import TYPE_CHECKING, Any

from hwcore.diffusion import messages
from hwcore.diffusion.router.libraries import zmq
from hwcore.diffusion.router.security import Security
from hwcore.diffusion.router.sockets import new_socket
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from hwcore.diffusion.engines.token import Token
    from hwcore.diffusion.router.config import RouterConfig
    from hwcore.diffusion.router.security import Party
    from hwcore.diffusion.router.sockets import Drops, Loop

__all__ = ["Doors"]

_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Doors:
    """The socket of clients and that of workers, each with the keys that it takes.

    A peer's identity is the name that it chose. Of two connections that claim one name the first
    stays (``ZMQ_ROUTER_HANDOVER`` is off): with it, two workers that were given the same name by
    mistake would take it from each other for ever, each ending the other's jobs. Once the first is
    gone, by its end or because libzmq's heartbeats found it silent, the other gets in.

    Parameters
    ----------
    token : Token
    config : RouterConfig
    host : str
    ports : tuple of int
        For clients and for workers; 0 for any.
    allow_remote : bool
    drops : Drops
        Counts connections that were refused.
    """

    def __init__(
        self,
        token: Token,
        config: RouterConfig,
        host: str,
        ports: tuple[int, int],
        allow_remote: bool,
        drops: Drops,
    ) -> None:
        host = _checked_host(host, allow_remote)
        security = Security(token, "Router")
        self._drops = drops
        self._context = zmq.Context()
        self._monitors: list[tuple[Any, Any]] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self._context.destroy, 0)
            self._gate = security.gate(self._context, lambda: drops("token"))
            if self._gate is not None:
                undo.callback(self._gate.close)
            self.clients, self.client_address = self._bind(
                security, "client", host, ports[0], config.max_input_bytes
            )
            self.workers, self.worker_address = self._bind(
                security, "worker", host, ports[1], config.max_result_bytes
            )
            undo.pop_all()

    def watch(self, loop: Loop) -> None:
        """Have a loop answer who may come in, and count who may not."""
        if self._gate is not None:
            loop.add(self._gate.socket, self._gate.handle)
        for _, monitor in self._monitors:
            loop.add(monitor, self._monitored)

    def close(self) -> None:
        """Close all; what was sent still goes out, for half a second."""
        for socket, monitor in self._monitors:
            socket.disable_monitor()
            monitor.close(0)
        self.clients.close()
        self.workers.close()
        if self._gate is not None:
            self._gate.close()
        self._context.term()

    def _bind(
        self, security: Security, party: Party, host: str, port: int, most_bytes: int
    ) -> tuple[Any, str]:
        socket = new_socket(self._context, zmq.ROUTER, max(most_bytes, messages.LARGEST))
        security.accept(socket, party)
        self._monitors.append((socket, socket.get_monitor_socket(_FAILURES)))
        try:
            socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            what, fix = f"{party}_port", "Take another, or 0 for any"
            message = describe("Router", what, port, f"one that is free at {host}: {error}", fix)
            raise OSError(error.errno, message) from error
        return socket, socket.last_endpoint.decode()

    def _monitored(self, frames: list[bytes]) -> None:
        from zmq.utils.monitor import parse_monitor_message

        event = parse_monitor_message(frames)
        if event["event"] != zmq.EVENT_HANDSHAKE_FAILED_AUTH:  # which the gate has counted
            self._drops("handshake", event["endpoint"])


def _checked_host(host: str, allow_remote: bool) -> str:
    fix = "Pass an address of this machine, such as 127.0.0.1"
    if not isinstance(host, str):
        raise ArgumentTypeError(describe("Router", "host", host, "a str", fix))
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        expected = "an IP address"
        raise ArgumentValueError(describe("Router", "host", host, expected, fix)) from error
    if not address.is_loopback and not allow_remote:
        expected = "a loopback address, unless allow_remote=True"
        raise ArgumentValueError(describe("Router", "host", host, expected, fix))
    return f"[{host}]" if address.version == 6 else host
