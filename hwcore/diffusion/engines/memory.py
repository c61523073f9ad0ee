"""Pre-faulted host memory, private or shared with other processes, as a tensor.

The pages are mapped here and not by :mod:`mmap`, whose object is closed by its owner while views
of it live, and which unmaps in forked children what they do not have.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_size
from hwcore.errors import ArgumentValueError, CapabilityError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HostMemory", "create_memfd", "is_sealed"]

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value
_DONTFORK = 10
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create_memfd(size_bytes: int) -> int:
    """Return a descriptor of new shared memory, its pages allocated and its size sealed.

    Raises
    ------
    ArgumentValueError
        If the machine has not that much memory left.
    CapabilityError
        If there is no memfd here, or it cannot be sealed.
    """
    check_pool_size(size_bytes)
    try:
        fd = os.memfd_create("hwcore-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        raise _no_memfd(error) from error
    try:
        os.ftruncate(fd, size_bytes)
        os.posix_fallocate(fd, 0, size_bytes)  # fails here, where touching the page would kill
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise _no_memfd(error) from error
    return fd


def is_sealed(fd: int, size_bytes: int) -> bool:
    """Say whether shared memory is of this size and stays so: less would kill who maps it."""
    try:
        return os.fstat(fd).st_size == size_bytes and (
            fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        )
    except OSError:  # no memfd at all
        return False


def check_pool_size(size_bytes: int) -> None:
    """Raise unless a pool of this size can be had: its pages are all taken at once."""
    where, fix = "open_engine", "Make the pool smaller"
    check_size(where, "`size_bytes`", size_bytes, 1, "Pass the size of the pool in bytes")
    left = _available_bytes()
    if left is not None and size_bytes > left:
        expected = f"at most {left}, what the machine has left"
        raise ArgumentValueError(describe(where, "`size_bytes`", size_bytes, expected, fix))


class HostMemory:
    """A mapping, and the tensor on it. It is unmapped with the last view of that tensor.

    Parameters
    ----------
    size_bytes : int
    fd : int or None
        Shared memory of that size, which is mapped and not kept open; None: private memory.
    inherit : bool
        False: a forked child does not have the mapping, and a view that it touches kills it.
    on_unmap : callable, optional
        Called once, after the pages are unmapped, in the process that mapped them.

    Attributes
    ----------
    tensor : Tensor, uint8, [size_bytes], on the CPU
    buffer : memoryview
        The same bytes.
    address : int
    """

    def __init__(
        self,
        size_bytes: int,
        fd: int | None = None,
        *,
        inherit: bool = True,
        on_unmap: Callable[[], None] | None = None,
    ) -> None:
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if fd is None else mmap.MAP_SHARED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        handle = -1 if fd is None else fd
        address = _LIBC.mmap(None, size_bytes, protection, kind | mmap.MAP_POPULATE, handle, 0)
        if address == _FAILED:
            reason = os.strerror(ctypes.get_errno())
            message = (
                f"HostMemory: the system said `{reason}` of a mapping of {size_bytes} bytes; "
                f"expected room for it. Make the pool smaller, or raise the limit (ulimit -v)."
            )
            raise CapabilityError(message)
        if not inherit:
            _LIBC.madvise(address, size_bytes, _DONTFORK)
        array = (ctypes.c_ubyte * size_bytes).from_address(address)
        self._unmap = weakref.finalize(array, _unmap, address, size_bytes, os.getpid(), on_unmap)
        self._unmap.atexit = False  # others may still look at it; the system takes it all
        self.address: int = address
        self.buffer = memoryview(array).cast("B")
        self.tensor = torch.frombuffer(array, dtype=torch.uint8)

    @property
    def mapped(self) -> bool:
        """Whether the pages are still there: after :meth:`release`, whether a view is."""
        return self._unmap.alive

    def release(self) -> None:
        """Let go of the memory: it is unmapped now, or with the last view of it."""
        self.buffer.release()
        self.__dict__.pop("tensor", None)


def _unmap(address: int, size_bytes: int, pid: int, on_unmap: Callable[[], None] | None) -> None:
    # A forked child that has no such mapping may have another one in its place.
    if os.getpid() == pid:
        _LIBC.munmap(address, size_bytes)
        if on_unmap is not None:
            on_unmap()


def _available_bytes() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _no_memfd(error: Exception) -> CapabilityError:
    message = (
        f"shm: the system said `{error}` of a memfd; expected shared memory that can be sealed. "
        f"Use the engine tcp here, or a kernel and a sandbox that allow memfd_create."
    )
    return CapabilityError(message)
