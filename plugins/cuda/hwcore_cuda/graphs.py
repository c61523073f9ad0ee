"""CUDA's own graphs, for :class:`hwcore.graphs.native.Graph`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from hwcore.types import Stream

__all__ = ["CudaCaptures"]


class CudaCaptures:
    """Captures by torch; the methods are those of :class:`hwcore.graphs.native.Captures`.

    Parameters
    ----------
    module : module
        ``torch.cuda``.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._streams: dict[int, Stream] = {}

    def create(self) -> Any:
        """Return a new graph of torch's."""
        return self._module.CUDAGraph()

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

    def discard(self, graph: Any, pool: Any) -> None:
        """Reset a graph, and give the pool back where torch does not.

        A graph whose ``capture_end`` failed on the device still takes the process's allocations for
        that pool, and ``reset`` does not know that it holds a share of it.
        """
        try:
            graph.pool()  # raises unless the capture has ended
        except RuntimeError:
            device = self._module.current_device()
            with contextlib.suppress(RuntimeError):  # it had not begun
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
        graph.reset()
