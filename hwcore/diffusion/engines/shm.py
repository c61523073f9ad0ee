"""Shared memory: a peer maps the pool, and what it writes there has landed.

The pool is a sealed memfd: no name, no size limit of a file system, gone with its last process,
however that ends. Its descriptor goes over a unix socket in a folder of this user's to whoever
proves to have the token. The connection lives as long as the mapping at the other end, so that
its end says that nothing more can be written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from hwcore.diffusion.engines.handshake import Reason, Refused, Welcome, accept, greet, welcome
from hwcore.diffusion.engines.host import HostEngine, Settings
from hwcore.diffusion.engines.listener import Listener
from hwcore.diffusion.engines.memory import HostMemory, create_memfd, is_sealed
from hwcore.diffusion.engines.peer import HostPeer, reaching
from hwcore.diffusion.engines.tcp import TcpPeer
from hwcore.diffusion.engines.watch import Watch, credentials
from hwcore.errors import CapabilityError, PeerError, PeerRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from hwcore.diffusion.engines.deadline import Deadline
    from hwcore.diffusion.engines.handshake import Session

__all__ = ["ShmEngine", "ShmPeer"]

_PREFIX = "hwcore-shm-"
_SOCKET = "engine"
_STALE_S = 60.0


class ShmEngine(HostEngine):
    """A pool that peers of this machine and user map; see :class:`Engine`.

    Raises
    ------
    CapabilityError
        If memory or its descriptor cannot be shared here.
    ArgumentValueError
        If the machine has not that much memory left.
    """

    name = "shm"

    def __init__(self, settings: Settings) -> None:
        with contextlib.ExitStack() as undo:
            self._memfd = create_memfd(settings.size_bytes)
            undo.callback(os.close, self._memfd)
            check_descriptors_pass(self._memfd)
            memory = HostMemory(settings.size_bytes, self._memfd)
            undo.callback(memory.release)
            folder, sock = _listening()
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            undo.callback(sock.close)
            super().__init__(settings, memory)
            # Also where nobody closes it; not in a forked child, which has it from its parent.
            self._folder = weakref.finalize(self, _remove, folder, os.getpid())
            self._address = f"shm:{folder / _SOCKET}"
            self._listener = Listener(self.name, sock, settings.max_peers, self._serve)
            undo.pop_all()

    def _serve(self, connection: socket.socket) -> None:
        pid, uid = credentials(connection)
        if uid != os.geteuid():
            detail = f"user {uid} connected, this is {os.geteuid()}"
            raise Refused(Reason.UID, detail)
        session = accept(connection, self._settings.token, self.name, self.id)
        with self._writer(session), Watch(connection, pid) as watch:
            welcome(connection, session, Welcome(self.size_bytes), [self._memfd])
            watch.gone(-1)

    def _dialers(self) -> Mapping[str, Callable[[str, Deadline], HostPeer]]:
        return {
            "shm": lambda path, deadline: ShmPeer.dial(self, path, deadline, self._settings),
            "tcp": lambda place, deadline: TcpPeer.dial(self, place, deadline, self._settings),
        }

    def _close_transport(self) -> None:
        os.close(self._memfd)
        self._folder()


class ShmPeer(HostPeer):
    """A pool that is mapped here; see :class:`Peer`.

    Closing it while views of ``memory`` are alive unmaps it with the last of them, and only then
    does the peer hear that this process can write no more.
    """

    def __init__(
        self,
        engine: HostEngine,
        address: str,
        sock: socket.socket,
        facts: tuple[Session, Welcome],
        mapped: tuple[HostMemory, int],
        settings: Settings,
    ) -> None:
        self._memory, pid = mapped
        self._registration = settings.registered(self._memory)
        super().__init__(engine, address, sock, facts, pid)

    @classmethod
    def dial(cls, engine: HostEngine, path: str, deadline: Deadline, settings: Settings) -> ShmPeer:
        """Connect to the socket at ``path`` and map what its engine passes."""
        address = f"shm:{path}"
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX))
            with reaching(address, deadline):
                sock.settimeout(deadline.left_s())
                sock.connect(path)
                pid, uid = credentials(sock)
            if uid != os.geteuid():
                message = (
                    f"connect: {address} is of user {uid}; expected {os.geteuid()}, this process's."
                    f" Run all processes of a launch as one user, or use the engine tcp."
                )
                raise PeerRefusedError(message)
            session, facts, descriptors = greet(
                sock, settings.token, "shm", engine.id, address, deadline
            )
            for fd in descriptors:
                undo.callback(os.close, fd)
            memory = _mapped(address, descriptors, facts.size_bytes, sock)
            undo.callback(memory.release)
            peer = cls(engine, address, sock, (session, facts), (memory, pid), settings)
            undo.pop_all()
        for fd in descriptors:
            os.close(fd)  # the mapping stays
        return peer

    @property
    def memory(self) -> Tensor:
        """The pool, mapped here."""
        self._check("memory")
        return self._memory.tensor

    def _write(self, source: Tensor, view: memoryview, offset: int, deadline: Deadline) -> None:
        self._memory.tensor[offset : offset + len(view)].copy_(source)
        if self._watch.gone():
            reason = "it is gone"
            raise self._lost(reason)

    def _interrupt(self) -> None:
        """Nothing to do: a copy ends by itself, and views may live on."""

    def _release(self) -> None:
        if self._registration is not None:
            self._registration.close()
        self._memory.release()  # and the socket with the last view


def check_descriptors_pass(fd: int) -> None:
    """Raise unless a descriptor can be passed over a unix socket here."""
    try:
        here, there = socket.socketpair(socket.AF_UNIX)
        with here, there:
            there.settimeout(1.0)
            socket.send_fds(here, [b"?"], [fd])
            _, descriptors, _, _ = socket.recv_fds(there, 1, 1, socket.MSG_CMSG_CLOEXEC)
            os.close(descriptors[0])
    except (OSError, IndexError) as error:
        message = (
            f"shm: the system said `{error}` of a descriptor sent over a unix socket; expected it "
            f"to pass. Use the engine tcp here, or a sandbox that allows SCM_RIGHTS."
        )
        raise CapabilityError(message) from error


def _mapped(
    address: str, descriptors: Sequence[int], size_bytes: int, sock: socket.socket
) -> HostMemory:
    """Map the pool that a peer passed; its socket is closed when it is unmapped."""
    if len(descriptors) != 1 or not is_sealed(descriptors[0], size_bytes):
        message = (
            f"connect: {address} passed {len(descriptors)} descriptors; expected one of a sealed "
            f"memfd of {size_bytes} bytes. Let descriptors pass between the two processes, or use "
            f"the engine tcp."
        )
        raise PeerError(message)
    return HostMemory(size_bytes, descriptors[0], inherit=False, on_unmap=sock.close)


def _listening() -> tuple[Path, socket.socket]:
    """Return a new folder that is this user's alone, and the socket that listens in it."""
    parent = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = None
    sock = socket.socket(socket.AF_UNIX)
    try:
        _sweep(Path(parent))
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # of mode 0700
        path = folder / _SOCKET
        sock.bind(os.fspath(path))
        path.chmod(0o600)  # before it listens: no connection is taken in between
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        message = (
            f"shm: the system said `{error}` of a unix socket below {parent}; expected one with a "
            f"path of less than 108 bytes. Set XDG_RUNTIME_DIR or TMPDIR to a short folder."
        )
        raise CapabilityError(message) from error
    return folder, sock


def _sweep(parent: Path) -> None:
    """Remove what engines left behind whose processes were killed: nobody listens there."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _STALE_S:
                continue  # another user's, or one that is about to listen
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                try:
                    probe.connect(os.fspath(folder / _SOCKET))
                except (ConnectionRefusedError, FileNotFoundError):
                    shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
