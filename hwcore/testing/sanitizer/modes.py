"""How the sanitizer hears of torch calls: a dispatch mode in each thread, and host reads.

Dispatch modes belong to a thread. Threads started while a sanitizer is on get one of their own;
autograd's threads take over the mode of the thread that called backward.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hwcore.testing.sanitizer.operations import enter_call, enter_host_read
from hwcore.testing.sanitizer.schemas import op_of
from hwcore.testing.sanitizer.tracker import overrides_dispatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.testing.sanitizer.tracker import Tracker

__all__ = ["Mode", "Patches"]


class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
    """Shows the tracker every torch call of a thread, once it has returned."""

    supports_higher_order_operators = True  # they pass; the ops that they run are seen

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch leaves it untyped
        self._tracker = tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(overrides_dispatch(cls) for cls in types):
            # A subclass makes plain calls, which come here again; but where torch traces, its own
            # mode must get the call, and nothing has memory.
            return func(*args, **kwargs) if _is_tracing() else NotImplemented
        op = op_of(func)
        if op.kind == "inert" or not self._tracker.active:
            return func(*args, **kwargs)
        if op.kind == "composite":
            # In inference mode composite ops arrive whole, views and copies alike.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        enter_call(self._tracker, func, op, args, kwargs, result)
        return result


def _is_tracing() -> bool:
    keys = torch._C._TorchDispatchModeKey
    modes = (keys.FAKE, keys.FUNCTIONAL, keys.PROXY)
    return any(torch._C._get_dispatch_mode(key) is not None for key in modes)


class Patches:
    """What has to be replaced, process-wide, while a sanitizer is on.

    ``threading.Thread.start``, to enter a mode in the new thread. ``Tensor.tolist``, ``numpy`` and
    ``cpu``, which read host memory without a torch call that a mode sees.
    """

    _READS = ("tolist", "numpy", "cpu")

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._put: list[tuple[type, str, Any, Any]] = []  # owner, name, what was there, what is

    def apply(self) -> None:
        """Replace the functions."""
        self._replace(threading.Thread, "start", self._starting())
        for name in self._READS:
            self._replace(torch.Tensor, name, self._reading(name))

    def undo(self) -> None:
        """Put back what was there; threads that run go on with a mode that does nothing.

        What another tool has replaced since is left to it, and calls on what this one put there.
        """
        for owner, name, before, ours in self._put:
            if vars(owner).get(name) is not ours:
                continue
            if before is None:
                delattr(owner, name)  # inherited from a class below
            else:
                setattr(owner, name, before)
        self._put = []

    def _replace(self, owner: type, name: str, function: Callable[..., Any]) -> None:
        self._put.append((owner, name, vars(owner).get(name), function))
        setattr(owner, name, function)

    def _starting(self) -> Callable[..., None]:
        start, tracker = threading.Thread.start, self._tracker

        @functools.wraps(start)
        def started(thread: threading.Thread) -> None:
            run = thread.run

            def watched() -> None:
                try:
                    with Mode(tracker):
                        run()
                finally:
                    del thread.run

            if not thread.ident:  # a second start is an error, for start to raise
                thread.run = watched  # type: ignore[method-assign]
            start(thread)

        return started

    def _reading(self, name: str) -> Callable[..., Any]:
        read = getattr(torch.Tensor, name)
        tracker = self._tracker

        @functools.wraps(read)
        def reading(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = read(tensor, *args, **kwargs)
            if tracker.active:
                enter_host_read(tracker, tensor, f"Tensor.{name}")
            return result

        return reading
