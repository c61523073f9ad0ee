"""Time that is left, and bytes of a socket before it is over."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from hwcore._checks import is_number
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    import socket

__all__ = ["Deadline", "receive", "receive_into", "send"]


class Deadline:
    """The end of a span that starts now.

    Parameters
    ----------
    where : str
        The function that speaks in errors.
    timeout_s : float
        Seconds, more than 0, finite.
    """

    def __init__(self, where: str, timeout_s: float) -> None:
        fix = "Pass how many seconds to wait at most"
        if not is_number(timeout_s):
            raise ArgumentTypeError(describe(where, "`timeout_s`", timeout_s, "a number", fix))
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            expected = "more than 0, and finite"
            raise ArgumentValueError(describe(where, "`timeout_s`", timeout_s, expected, fix))
        self.where, self.timeout_s = where, timeout_s
        self._end = time.monotonic() + timeout_s

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._end

    def left_s(self) -> float:
        """Return the seconds left.

        Raises
        ------
        TimeoutError
            If there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def receive(sock: socket.socket, count: int, deadline: Deadline) -> bytes:
    """Return exactly ``count`` bytes; TimeoutError late, EOFError where they end before."""
    data = bytearray(count)
    receive_into(sock, memoryview(data), deadline)
    return bytes(data)


def receive_into(sock: socket.socket, view: memoryview, deadline: Deadline) -> None:
    """Fill ``view``; TimeoutError late, EOFError where the bytes end before."""
    while view:
        sock.settimeout(deadline.left_s())
        count = sock.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]


def send(sock: socket.socket, deadline: Deadline, *parts: bytes | memoryview) -> None:
    """Send all parts, in one call where they fit; TimeoutError late."""
    views = [memoryview(part) for part in parts if len(part)]
    while views:
        sock.settimeout(deadline.left_s())
        count = sock.sendmsg(views)
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if views:
            views[0] = views[0][count:]
