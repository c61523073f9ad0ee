"""Notice that a process is gone: by its socket, and by its process descriptor where it has one."""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import TYPE_CHECKING

from hwcore.diffusion.engines import forks

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Watch", "credentials"]


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Return pid and uid of who made a unix socket's other end, as the kernel knows them."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


class Watch:
    """Whether the other end of a socket is gone.

    The socket alone is not enough: a forked child of the peer keeps it open. The process
    descriptor alone neither: a peer may close its end and live on, or live where it has no number
    here.

    Parameters
    ----------
    sock : socket
        Stays the caller's.
    pid : int or None
        The process at its other end, where it is one of this machine.
    """

    def __init__(self, sock: socket.socket, pid: int | None = None) -> None:
        self._epoll = select.epoll()
        self._socket_fd, self._process_fd = sock.fileno(), None
        self._gone = False
        self._epoll.register(self._socket_fd, select.EPOLLRDHUP)
        if pid:
            try:
                self._process_fd = os.pidfd_open(pid)
                self._epoll.register(self._process_fd, select.EPOLLIN)
            except ProcessLookupError:
                self._gone = True
            except OSError:  # not to be seen from here: the socket must do
                self._process_fd = None
        forks.close_in_children(self)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Return a descriptor that polls as readable once the other end is gone; -1 if closed."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def gone(self, timeout_s: float = 0.0) -> bool:
        """Wait, and say whether the other end is gone; -1 waits for as long as it takes."""
        if not self._gone:
            try:
                self._gone = bool(self._epoll.poll(timeout_s))
            except (ValueError, OSError):  # closed under it: not known to be gone
                return False
        return self._gone

    def close(self) -> None:
        """Stop watching."""
        self._epoll.close()
        process_fd, self._process_fd = self._process_fd, None
        if process_fd is not None:
            os.close(process_fd)
