"""Graphs that a device captures by itself, with the surface that the tape has.

A plugin says how its device begins and ends a capture (:mod:`hwcore.graphs.native_captures`); what
a capture owes its caller, whatever goes wrong in it, is here once.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from hwcore.errors import ArgumentTypeError, CaptureError, HwcoreError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.graphs.native_captures import Captures
    from hwcore.types import Stream

__all__ = ["Graph", "in_capture"]

T = TypeVar("T")

_log = logging.getLogger("hwcore")


class _Thread(threading.local):
    capturing = False


_thread = _Thread()


def in_capture() -> bool:
    """Return whether this thread is inside :meth:`Graph.capture`, on whatever stream.

    The device is asked about one stream. A side stream that the captured function is about to fork
    to takes part in no capture yet, and what is refused in a capture is refused there too.
    """
    return _thread.capturing


class Graph:
    """Device work, recorded once by the device and run by each ``replay`` at the same addresses.

    Capturing runs nothing: outputs hold values only after the first replay. Every address is
    frozen, so inputs are changed in place.

    Parameters
    ----------
    captures : Captures

    Attributes
    ----------
    native : object or None
        The device's own graph, for its own tools; None where nothing is captured.
    """

    def __init__(self, captures: Captures) -> None:
        self._captures = captures
        self._closed = False
        self._pool: Any = None
        self._outputs: Any = None
        self.native: Any = None

    def capture(self, fn: Callable[[], T], pool: Any = None, stream: Stream | None = None) -> T:
        """Record the device work of ``fn()``.

        Parameters
        ----------
        fn : callable without arguments
            Called exactly once. An exception of its own propagates.
        pool : object, optional
            Memory to share with other graphs. By default the graph has its own.
        stream : Stream, optional
            Where to capture. By default a stream that is kept for it.

        Returns
        -------
        outputs
            What fn returned. Each replay writes into these very tensors.

        Raises
        ------
        CaptureError
            If fn does what a graph cannot hold: waits for the device, reads a value on the host,
            forks to a stream without joining it. If the device begins no capture, on its default
            stream for one; if this thread is capturing already; if the graph is not empty.

        Notes
        -----
        After any exception the current stream is as before, the capture has ended, the device's
        graph is discarded and its share of the pool given back; this graph is empty and can
        capture again.
        """
        if not callable(fn):
            fix, expected = "Pass a function", "a callable without arguments"
            raise ArgumentTypeError(describe("Graph.capture", "fn", fn, expected, fix))
        if _thread.capturing:
            _misuse("capture", "was called inside a capture", "Capture one graph after the other")
        if self._closed or self.native is not None:
            state = "closed" if self._closed else "captured already"
            _misuse("capture", f"the graph is {state}; expected an empty one", "Make a new Graph")
        captures = self._captures
        # One that the device makes by itself could not be given back after a capture that failed.
        pool = captures.pool() if pool is None else pool
        native = captures.create()
        _thread.capturing = True
        try:
            with captures.context(captures.stream() if stream is None else stream):
                outputs = self._record(native, fn, pool)
        finally:
            _thread.capturing = False
        self.native, self._pool, self._outputs = native, pool, outputs
        return outputs

    def replay(self) -> Any:
        """Submit the recorded work to the current stream, and return the captured outputs.

        Raises
        ------
        CaptureError
            If nothing was captured, or the graph was closed.
        """
        if self.native is None:
            state = "closed" if self._closed else "empty"
            fix = "Call capture(fn) on a new Graph first"
            _misuse("replay", f"the graph is {state}; expected a captured one", fix)
        self.native.replay()
        return self._outputs

    def close(self) -> None:
        """Give the graph's memory back. Its last replay has finished, as the caller knows."""
        if self.native is not None:
            self._discard(self.native, self._pool)
        self.native = self._pool = self._outputs = None
        self._closed = True

    def _record(self, native: Any, fn: Callable[[], T], pool: Any) -> T:
        captures = self._captures
        captures.prepare()
        try:
            captures.begin(native, pool)
        except BaseException as error:
            self._abandon(native, pool)
            if _is_the_device(error):
                fix = "Capture on a side stream, with a pool that no other capture is using"
                _misuse("capture", f"the device began no capture: {error}", fix, error)
            raise
        try:
            outputs = fn()
        except BaseException as error:
            if not self._abandon(native, pool) and _is_the_device(error):
                _refuse(f"fn broke the capture: {error}", error)
            raise
        try:
            captures.end(native)
        except BaseException as error:
            self._discard(native, pool)
            if _is_the_device(error):
                _refuse(f"the capture of fn could not be ended: {error}", error)
            raise
        return outputs

    def _abandon(self, native: Any, pool: Any) -> bool:
        """End a capture whose function failed; say whether the device had one to end."""
        try:
            self._captures.end(native)
        except Exception:  # noqa: BLE001 - the caller has the error that this one follows from
            ended = False
        else:
            ended = True
        self._discard(native, pool)
        return ended

    def _discard(self, native: Any, pool: Any) -> None:
        try:
            self._captures.discard(native, pool)
        except Exception:  # noqa: BLE001 - it would hide the error that says what is wrong
            _log.exception("%r could not be discarded; its memory stays with it", native)


def _is_the_device(error: BaseException) -> bool:
    """Say whether an error has a device's words for what a capture is: no name of its own."""
    named = (HwcoreError, torch.OutOfMemoryError)
    return isinstance(error, RuntimeError) and not isinstance(error, named)


def _refuse(what: str, cause: BaseException) -> NoReturn:
    expected = "device work alone, of shapes and addresses that are known beforehand"
    fix = "Move out of it what waits for the device, and join every stream that it forks to"
    _misuse("capture", f"{what.rstrip('.')}; expected {expected}", fix, cause)


def _misuse(method: str, got: str, fix: str, cause: BaseException | None = None) -> NoReturn:
    message = f"Graph.{method}: {got.rstrip('.')}. {fix}."
    raise CaptureError(message) from cause
