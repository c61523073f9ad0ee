"""A graph without a device: the torch calls of a function, rerun into the same addresses."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from hwcore.errors import ArgumentTypeError, CaptureError, describe
from hwcore.graphs.host_reads import HostReads, tensors_in
from hwcore.graphs.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Tape", "is_capturing"]

T = TypeVar("T")


class _Thread(threading.local):
    capturing = False


_thread = _Thread()


def is_capturing() -> bool:
    """Return whether this thread is inside :meth:`Tape.capture`."""
    return _thread.capturing


class Tape:
    """A graph for a device that has none: torch calls recorded once and rerun on demand.

    What a device graph freezes, a tape freezes: host values, shapes and addresses. A tensor that
    the captured function read or wrote is read or written at the same address by every replay, so
    inputs, and weights, are changed in place (``copy_``). What fn makes from host data
    (``torch.tensor([1, 2])``) is a constant.

    A device graph only records while it captures; a tape does the work as well. A counter that fn
    increments in place has been incremented once after ``capture``, and once more after each
    ``replay``.

    Notes
    -----
    Random numbers are drawn anew by each replay, from the generator of the captured call: after
    seeding it a replay draws what fn would have drawn. Autocast is captured with the calls; its
    state and the grad mode around ``replay`` do not matter.

    Only torch calls of the capturing thread are seen. Not recorded, and not refused either: what a
    C extension, ``pickle``, ``torch.utils.dlpack.to_dlpack`` or another thread does with a tensor.

    Every tensor of the captured function, intermediate ones too, stays allocated until ``close``.
    One thread at a time replays a tape, whichever that is.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] | None = None
        self._devices: set[str] = set()
        self._outputs: Any = None
        self._closed = False

    def capture(self, fn: Callable[[], T]) -> T:
        """Run a function once and record its torch calls.

        Parameters
        ----------
        fn : callable without arguments
            Called exactly once. An exception of its own propagates, and leaves the tape empty and
            ready for another capture.

        Returns
        -------
        outputs : any pytree
            What fn returned. Each replay writes into these very tensors.

        Raises
        ------
        CaptureError
            If fn reads a tensor's value on the host, makes a shape that depends on values, changes
            a tensor's storage, or returns a tensor that autograd tracks; if this thread is
            capturing already; if the tape holds a capture or was closed.
        """
        if not callable(fn):
            fix = "Pass a function without arguments"
            raise ArgumentTypeError(describe("Tape.capture", "fn", fn, "a callable", fix))
        if is_capturing():
            _misuse("capture", "was called inside a capture", "Capture one graph after the other")
        if self._closed or self._steps is not None:
            state = "closed" if self._closed else "captured already"
            _misuse("capture", f"the tape is {state}; expected an empty one", "Make a new Tape")
        recorder = Recorder()
        _thread.capturing = True
        try:
            with HostReads(), recorder:
                outputs = fn()
        finally:
            _thread.capturing = False
        # A leaf that requires grad is a parameter handed through; autograd tracks what has a node.
        if any(t.grad_fn is not None for t in tensors_in(outputs)):
            fix = "Capture under torch.no_grad() or torch.inference_mode()"
            got = "fn returned a tensor that autograd tracks; expected one without grad_fn"
            _misuse("capture", got, fix)
        self._steps, self._outputs = recorder.finish(outputs), outputs
        self._devices = {d for d in recorder.devices if torch.amp.is_autocast_available(d)}
        return outputs

    def replay(self) -> Any:
        """Rerun the recorded calls into the captured addresses.

        Returns
        -------
        outputs : any pytree
            The object that ``capture`` returned, its tensors holding new values.

        Raises
        ------
        CaptureError
            If nothing was captured, the tape was closed, or this thread is capturing.
        """
        if self._steps is None:
            state = "closed" if self._closed else "empty"
            fix = "Call capture(fn) on a new Tape first"
            _misuse("replay", f"the tape is {state}; expected a captured one", fix)
        if is_capturing():
            _misuse("replay", "was called inside a capture", "Replay before or after it")
        with contextlib.ExitStack() as stack:
            # The calls were recorded below autograd and autocast: neither may act a second time.
            stack.enter_context(torch.inference_mode())
            for device in self._devices:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            for step in self._steps:
                step()
        return self._outputs

    def close(self) -> None:
        """Release every tensor that the tape keeps alive. It cannot be used again."""
        self._steps = self._outputs = None
        self._closed = True


def _misuse(method: str, got: str, fix: str) -> NoReturn:
    message = f"Tape.{method}: {got}. {fix}."
    raise CaptureError(message)
