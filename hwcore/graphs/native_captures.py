"""How a device captures a graph: what a plugin brings for :class:`hwcore.graphs.native.Graph`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from hwcore.types import Stream

__all__ = ["Captures", "ModuleCaptures"]


class Captures(Protocol):
    """Each step of a capture, as a device does it."""

    def create(self) -> Any:
        """Return a new, empty graph of the device, with a method ``replay()``."""

    def pool(self) -> Any:
        """Return a handle of memory that graphs may share."""

    def stream(self) -> Stream:
        """Return the stream to capture on where the caller names none."""

    def context(self, stream: Stream) -> AbstractContextManager[Any]:
        """Return a context in which a stream is current; leaving it must not raise."""

    def prepare(self) -> None:
        """Make room before a capture, which cannot be done in it. The host may wait."""

    def begin(self, graph: Any, pool: Any) -> None:
        """Begin a capture on the current stream, with memory from ``pool``."""

    def end(self, graph: Any) -> None:
        """End the capture of the current stream. After it ``graph`` can be replayed."""

    def is_capturing(self) -> bool:
        """Say whether the current stream takes part in a capture, whoever began it."""

    def discard(self, graph: Any, pool: Any) -> None:
        """Empty a graph, in whatever state, and give back what it holds of its pool."""


class ModuleCaptures:
    """Captures through torch's module of a device, with graphs as torch's own devices have them.

    Parameters
    ----------
    module : module
        Such as ``torch.get_device_module()`` returns.
    new_graph : callable
        Returns a new graph of the module's: with ``capture_begin(pool=, capture_error_mode=)``,
        ``capture_end``, ``replay``, ``reset``, ``pool``.
    release : callable, optional
        Called with a device's index and a pool where a graph's capture did not end: gives back what
        ``reset`` leaves. It may raise RuntimeError where there is nothing to give back.
    """

    def __init__(
        self,
        module: Any,
        new_graph: Callable[[], Any],
        release: Callable[[int, Any], None] | None = None,
    ) -> None:
        self._module = module
        self._new_graph = new_graph
        self._release = release
        self._streams: dict[int, Stream] = {}

    def create(self) -> Any:
        """Return a new graph of torch's."""
        return self._new_graph()

    def pool(self) -> Any:
        """Return the handle of a new pool."""
        return self._module.graph_pool_handle()

    def stream(self) -> Stream:
        """Return the current device's stream for captures, made at the first."""
        index = self._module.current_device()
        if index not in self._streams:
            self._streams[index] = self._module.Stream()
        return self._streams[index]

    def context(self, stream: Stream) -> AbstractContextManager[Any]:
        """Return torch's own context, one object for each entry."""
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    def prepare(self) -> None:
        """Wait for the device and free what the allocator keeps, which a capture must not do."""
        self._module.synchronize()
        self._module.empty_cache()

    def begin(self, graph: Any, pool: Any) -> None:
        """Begin on the current stream; other threads, of which a server has many, go on."""
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")

    def end(self, graph: Any) -> None:
        """End, and make the graph ready to run."""
        graph.capture_end()

    def is_capturing(self) -> bool:
        """Ask the device about the current stream."""
        return bool(self._module.is_current_stream_capturing())

    def discard(self, graph: Any, pool: Any) -> None:
        """Reset a graph, and give the pool back where torch does not.

        A graph whose ``capture_end`` failed on the device still takes the process's allocations for
        that pool, and ``reset`` does not know that it holds a share of it.
        """
        if self._release is not None:
            try:
                graph.pool()  # raises unless the capture has ended
            except RuntimeError:
                with contextlib.suppress(RuntimeError):  # it had not begun
                    self._release(self._module.current_device(), pool)
        graph.reset()
