"""Send what a library writes to descriptor 2 to the log, and leave everybody else's lines alone."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["diverted"]

_log = logging.getLogger("hwcore")
_LIBRARY = re.compile(rb"[IWEF]\d{4,8} \d\d:\d\d:\d\d\.\d+ |WARNING: Logging before InitGoogle")
_lock = threading.Lock()
_depth = 0
_saved_fd = _caught_fd = -1


@contextlib.contextmanager
def diverted() -> Iterator[None]:
    """Log the library's lines at DEBUG while the block runs.

    Descriptor 2 is the whole process's, and there is no other place to stop these lines. Whatever
    else is written in the meantime, by any thread, is passed on when the last of overlapping
    blocks ends. Two things are lost: what a child writes that is started within a block, and what
    is written by a process that dies in one. So blocks are short, and no write runs in one.
    """
    _begin()
    try:
        yield
    finally:
        _end()


def _begin() -> None:
    global _depth, _saved_fd, _caught_fd
    with _lock:
        _depth += 1
        if _depth > 1:
            return
        try:
            _saved_fd = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError:  # the process runs without
            _saved_fd = -1
            return
        # A file and not a pipe: it takes any number of lines without a thread that reads them.
        _caught_fd = os.memfd_create("hwcore-stderr")
        fcntl.fcntl(_caught_fd, fcntl.F_SETFL, os.O_APPEND)
        os.dup2(_caught_fd, 2)


def _end() -> None:
    global _depth, _saved_fd, _caught_fd
    with _lock:
        _depth -= 1
        if _depth or _saved_fd < 0:
            return
        os.dup2(_saved_fd, 2)
        text = os.pread(_caught_fd, os.fstat(_caught_fd).st_size, 0)
        os.close(_saved_fd)
        os.close(_caught_fd)
        _saved_fd = _caught_fd = -1
    lines = text.splitlines(keepends=True)
    others = [line for line in lines if not _LIBRARY.match(line)]
    if others:
        with contextlib.suppress(OSError):
            os.write(2, b"".join(others))
    for line in lines:
        if _LIBRARY.match(line):
            _log.debug("mooncake: %s", line.decode(errors="replace").rstrip())
