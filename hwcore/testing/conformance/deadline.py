"""A call with a deadline, for code that may never return."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DeadlineError", "within"]

_MERCY_S = 1.0


class DeadlineError(Exception):
    """The call did not return in time; ``inside`` says where it was."""

    def __init__(self, inside: str | None) -> None:
        super().__init__()
        self.inside = inside


def within(
    timeout_s: float,
    function: Callable[[], object],
    inside: Callable[[int | None], str | None] = lambda thread: None,
) -> None:
    """Run a function in a thread of its own, and give up on it after ``timeout_s``.

    An exception of the function is raised here. A thread that is given up on inside a hook gets an
    exception sent into it, which ends a loop in Python; any other is left behind. Native code
    that keeps the interpreter's lock stops this process altogether: for that there is the process
    around it (:mod:`hwcore.testing.conformance.runner`).

    Parameters
    ----------
    inside : callable
        Asked at the deadline, with the thread's identity, where the call is.

    Raises
    ------
    DeadlineError
        If the function did not return in time.
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            raised.append(error)

    thread = threading.Thread(target=call, name="hwcore-conformance", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        where = inside(thread.ident)
        if where is not None:  # elsewhere it may be importing, which must not be cut short
            _send_exit(thread.ident)
            thread.join(_MERCY_S)
        raise DeadlineError(where)
    if raised:
        raise raised[0]


def _send_exit(thread: int | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread or 0), ctypes.py_object(SystemExit)
    )
