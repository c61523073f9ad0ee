"""Host memory made known to a device, until it is closed."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import TYPE_CHECKING

from hwcore.errors import ArgumentTypeError, ArgumentValueError, CapabilityError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Registration"]


class Registration:
    """A buffer that a device's driver has page-locked. Closing it, or losing it, unlocks it.

    Parameters
    ----------
    buffer : memoryview
        Writable, contiguous, not empty. It cannot be resized or unmapped before it is closed.
    lock : callable
        Called with address and size in bytes; raises RuntimeError where the driver refuses.
    unlock : callable
        Called with the address, once, unless ``lock`` raised.

    Attributes
    ----------
    address : int
    size_bytes : int

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the buffer is none that could be page-locked.
    CapabilityError
        If the driver refuses.
    """

    def __init__(
        self,
        buffer: memoryview,
        lock: Callable[[int, int], None],
        unlock: Callable[[int], None],
    ) -> None:
        where, what = "register_host_memory", "`buffer`"
        if not isinstance(buffer, memoryview):
            fix = "Pass memoryview(buffer)"
            raise ArgumentTypeError(describe(where, what, buffer, "a memoryview", fix))
        if buffer.readonly or not buffer.c_contiguous or not buffer.nbytes:
            state = f"readonly={buffer.readonly}, contiguous={buffer.c_contiguous}"
            got = f"{state}, {buffer.nbytes} bytes"
            expected = "a writable, contiguous one of at least one byte"
            fix = "Pass the whole buffer of a mapping that was opened for writing"
            raise ArgumentValueError(describe(where, what, got, expected, fix))
        self.size_bytes = buffer.nbytes
        # Holds the buffer's memory: its owner cannot unmap what the driver has locked.
        held = (ctypes.c_char * self.size_bytes).from_buffer(buffer)
        self.address = ctypes.addressof(held)
        try:
            lock(self.address, self.size_bytes)
        except RuntimeError as error:
            message = (
                f"{where}: the driver said `{error}` of {self.size_bytes} bytes; expected memory "
                f"that it can page-lock. Close an earlier registration of the same memory, or "
                f"register less: all of it must fit into the machine's memory."
            )
            raise CapabilityError(message) from error
        self._close = weakref.finalize(self, _unlock, unlock, self.address, [held], os.getpid())

    def close(self) -> None:
        """Unlock the memory and let its owner have it back. Once is enough."""
        self._close()


def _unlock(unlock: Callable[[int], None], address: int, held: list[object], pid: int) -> None:
    try:
        if os.getpid() == pid:  # a forked child has the mapping, and no device to tell of it
            unlock(address)
    finally:
        held.clear()
