"""Raw access: values read past the API under test, by torch alone.

A test that put work in a stream by ``stream_context``, ordered it by ``wait_event`` and read the
result after ``synchronize`` would fail for a fault in any of the three. So a test calls the one
hook that it is about, and leaves the rest to this class, which calls no hook.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from hwcore.types import Stream

__all__ = ["RawAccess"]

STALL_S = 0.1
"""How long the work of :meth:`RawAccess.stall` takes, about."""

_SIDE = 1024
_MOST_LAUNCHES = 4000


class RawAccess:
    """Reads and delays a device's work through torch's own streams.

    A vendor overrides what torch alone cannot do well on the device; see docs/conformance.md. One
    object serves one run, and one test at a time.

    Attributes
    ----------
    computes_on_the_host : bool
        The device's work is done by the host's own threads, so that processor time says nothing
        about how the host waits.
    """

    computes_on_the_host = False

    def __init__(self) -> None:
        self._slow_work: dict[torch.device, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Return a context in which torch puts work in ``stream``."""
        return cast("AbstractContextManager[Any]", stream)

    def settle(self) -> None:
        """Block the host until all work on all devices has finished."""
        if torch.accelerator.is_available():
            for index in range(torch.accelerator.device_count()):
                torch.accelerator.synchronize(index)

    def release_cached(self) -> None:
        """Give memory back to the device that an allocator keeps for later tensors."""
        if torch.accelerator.is_available():
            self.settle()
            torch.accelerator.empty_cache()

    def read(self, tensor: torch.Tensor, stream: Stream | None = None) -> torch.Tensor:
        """Return a copy of ``tensor`` on the CPU.

        Parameters
        ----------
        stream : Stream, optional
            Wait for the work now in this stream, and what that work waits for, and no other: so
            that an order which was never asked for does not come about by waiting for everything.
            Default: wait for all work.
        """
        if stream is None:
            self.settle()
            return tensor.detach().cpu().clone()
        stream.synchronize()
        with self.on(stream):
            return tensor.detach().cpu().clone()

    def stall(self, stream: Stream) -> None:
        """Keep ``stream`` busy for about a tenth of a second, so that what follows in it is late.

        Nothing to do where work is done by the time that a call returns.
        """
        if stream.device.type == "cpu":
            return
        source, target, launches = self._prepared(stream.device)
        with self.on(stream):
            for _ in range(launches):
                torch.mm(source, source, out=target)

    def observable(self, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of zeros that work can write to and :meth:`peek` can read."""
        host = torch.zeros(like.shape, dtype=like.dtype)
        return host if like.device.type == "cpu" else host.pin_memory()

    def peek(self, observable: torch.Tensor) -> torch.Tensor:
        """Return what an observable tensor holds now, waiting for nothing."""
        return observable.clone()

    def priority(self, stream: Stream) -> int | None:
        """Return the priority that a stream runs with; None where torch cannot tell."""
        return getattr(stream, "priority", None)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Say whether a CPU tensor is page-locked, as torch sees it."""
        return tensor.is_pinned()

    def _prepared(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return what to multiply, where to, and how many times."""
        if device not in self._slow_work:
            source = torch.zeros(_SIDE, _SIDE, device=device)
            target = torch.empty_like(source)
            torch.mm(source, source, out=target)
            self.settle()
            rounds = 16
            began = time.perf_counter()
            for _ in range(rounds):
                torch.mm(source, source, out=target)
            self.settle()
            each_s = (time.perf_counter() - began) / rounds
            launches = min(max(int(STALL_S / each_s), 1), _MOST_LAUNCHES)
            self._slow_work[device] = source, target, launches
        return self._slow_work[device]
