"""What the pools of other processes have in common: one write at a time, checked, with an end."""

from __future__ import annotations

import abc
import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, Self

from hwcore.diffusion.checksum import bytes_of
from hwcore.diffusion.engines import forks
from hwcore.diffusion.engines.deadline import Deadline
from hwcore.diffusion.engines.forks import check_process
from hwcore.diffusion.engines.watch import Watch
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ClosedError,
    LateWriteError,
    PeerError,
    PeerTimeoutError,
    describe,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from torch import Tensor

    from hwcore.diffusion.engines.handshake import Session, Welcome
    from hwcore.diffusion.engines.host import HostEngine

__all__ = ["CUT_SHORT", "HostPeer", "reaching"]

CUT_SHORT = "a write before this one was cut short"


class HostPeer(abc.ABC):
    """A pool of another process; see :class:`Peer`."""

    def __init__(
        self,
        engine: HostEngine,
        address: str,
        sock: socket.socket,
        facts: tuple[Session, Welcome],
        pid: int | None = None,
    ) -> None:
        session, welcome = facts
        self.id, self.size_bytes = session.peer_id, welcome.size_bytes
        self._engine, self._address, self._sock = engine, address, sock
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._state = threading.Lock()
        self._closed = False
        self._broken = ""
        self._watch = Watch(sock, pid)
        forks.close_in_children(sock)

    def __repr__(self) -> str:
        return f"<hwcore peer {self.id} at {self._address}, {self.size_bytes} bytes>"

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
    def memory(self) -> Tensor | None:
        """The pool itself where it is mapped here, else None."""
        self._check("memory")
        return None

    @property
    def alive(self) -> bool:
        """Whether it is connected, as far as is known here."""
        if os.getpid() != self._pid:  # before the text is made, which takes longer
            check_process(f"{self._where}: alive", self._pid)
        return not (self._closed or self._broken or self._watch.gone())

    def fileno(self) -> int:
        """Return a descriptor that polls as readable once the peer is gone; -1 after close."""
        check_process(f"{self._where}: fileno", self._pid)
        return self._watch.fileno()

    def write(self, source: Tensor, offset: int, timeout_s: float) -> None:
        """Write into the peer's pool; see :class:`Peer`."""
        self._check("write")
        view = bytes_of(self._where, "source", source)
        deadline = Deadline(self._where, timeout_s)
        self._check_place(offset, len(view))
        if not self._turn.acquire(timeout=timeout_s):
            raise self._late(deadline, "another thread's write has not ended")
        try:
            self._check("write")
            if self._broken or self._watch.gone():
                raise self._lost(self._broken or "it is gone")
            if view:
                self._write(source, view, offset, deadline)
        finally:
            self._turn.release()

    def close(self) -> None:
        """Disconnect. Once is enough; a write that runs fails."""
        if os.getpid() != self._pid:
            return
        with self._state:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(OSError):
            self._interrupt()
        with self._turn:
            self._release()
            self._watch.close()
        self._engine.forget(self)

    # --- For the engines ---

    @abc.abstractmethod
    def _write(self, source: Tensor, view: memoryview, offset: int, deadline: Deadline) -> None:
        """Write, checked, alone, at least one byte."""

    def _interrupt(self) -> None:
        """Make a write that runs end soon."""
        self._sock.shutdown(socket.SHUT_RDWR)

    def _release(self) -> None:
        """Let go of the connection; no write runs."""
        self._sock.close()

    @property
    def _where(self) -> str:
        return f"peer {self._address}"

    def _check(self, what: str) -> None:
        if os.getpid() != self._pid:
            check_process(f"{self._where}: {what}", self._pid)
        if self._closed:
            message = (
                f"{self._where}: {what}: it was closed here; expected an open peer. Connect again."
            )
            raise ClosedError(message)

    def _check_place(self, offset: int, count: int) -> None:
        fix = f"Write within the peer's pool of {self.size_bytes} bytes"
        if isinstance(offset, bool) or not isinstance(offset, int):
            raise ArgumentTypeError(describe(self._where, "`offset`", offset, "an int", fix))
        if not 0 <= offset <= self.size_bytes - count:
            expected = f"0 to {self.size_bytes - count}, for {count} bytes"
            raise ArgumentValueError(describe(self._where, "`offset`", offset, expected, fix))

    def _lost(self, reason: str) -> Exception:
        """Return the error of a write after which the peer takes no more."""
        if self._closed:
            message = f"{self._where}: write: it was closed meanwhile; expected it to stay open."
            return ClosedError(f"{message} Close a peer after its last write.")
        self._broken = self._broken or reason
        return self._failed(reason)

    def _failed(self, reason: str) -> PeerError:
        """Return the error of a write after which the peer takes others."""
        message = f"{self._where}: write: {reason}; expected the bytes to land. Connect again, or"
        return PeerError(f"{message} send to another peer.")

    def _late(self, deadline: Deadline, reason: str, *, may_land: bool = False) -> PeerTimeoutError:
        """Return the error of a write that took too long; ``may_land``: its bytes still may."""
        message = (
            f"{self._where}: write: {reason} after {deadline.timeout_s} s; expected the bytes to "
            f"land before. See whether that process is stopped or overloaded, or wait longer."
        )
        if not may_land:
            return PeerTimeoutError(message)
        return LateWriteError(f"{message} They may still land until this engine is closed.")


@contextlib.contextmanager
def reaching(address: str, deadline: Deadline) -> Iterator[None]:
    """Name what goes wrong while connecting to ``address``."""
    try:
        yield
    except PeerError:
        raise
    except TimeoutError as error:
        message = (
            f"connect: {address} did not take the connection for {deadline.timeout_s} s; expected "
            f"an engine. See whether its process is stopped, or wait longer."
        )
        raise PeerTimeoutError(message) from error
    except OSError as error:
        message = (
            f"connect: the system said `{error}` of {address}; expected an engine that listens. "
            f"See whether its process has ended, and can be reached from this one."
        )
        raise PeerError(message) from error
