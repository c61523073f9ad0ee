"""Forked children: they use nothing of their parent's, and keep no socket that hides its end."""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Protocol

from hwcore.errors import ForkError

__all__ = ["check_process", "close_in_children"]


class _Closable(Protocol):
    def close(self) -> None: ...


_owned: weakref.WeakSet[_Closable] = weakref.WeakSet()


def close_in_children(thing: _Closable) -> None:
    """Have a socket or watch closed in every child that is forked from now on."""
    _owned.add(thing)


def check_process(where: str, pid: int) -> None:
    """Raise in a process forked from the one that made the object."""
    if os.getpid() != pid:
        message = (
            f"{where}: belongs to process {pid}, from which this one ({os.getpid()}) was forked; "
            f"expected the process that made it. Open an engine in the child, or start it by spawn."
        )
        raise ForkError(message)


def _in_child() -> None:
    for thing in list(_owned):
        with contextlib.suppress(OSError, ValueError):
            thing.close()
    _owned.clear()


os.register_at_fork(after_in_child=_in_child)
