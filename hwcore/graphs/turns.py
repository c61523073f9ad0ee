"""Uses of one memory by several streams, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from hwcore.backend import Backend
    from hwcore.types import Stream

__all__ = ["Turns"]


class Turns:
    """Makes each use of a memory wait for the use before it, on whatever streams they run.

    A use begins with :meth:`begin` and ends with :meth:`end`, both on the stream that was current
    at the beginning. The host waits in neither. On one stream no wait is enqueued.

    One event is enough: a use is recorded after it has waited for the one before, so that the
    latest record stands for all.

    Parameters
    ----------
    backend : Backend
    memory : Tensor
        What takes turns; its allocator is told of each stream that uses it.
    """

    def __init__(self, backend: Backend, memory: torch.Tensor) -> None:
        self._hw = backend
        self._memory = memory
        self._event = backend.create_event(memory.device)
        # Where the memory was made: the allocator knows that stream, nothing else does.
        self._last = backend.current_stream(memory.device)
        backend.record_event(self._event, self._last)

    def begin(self) -> Stream:
        """Let the current stream wait for the last use, and return it."""
        stream = self._hw.current_stream(self._memory.device)
        if stream is not self._last and stream != self._last:
            self._hw.wait_event(self._event, stream)
            self._hw.record_stream(self._memory, stream)
        return stream

    def end(self, stream: Stream) -> None:
        """Mark the use that began on ``stream`` as all submitted."""
        self._hw.record_event(self._event, stream)
        self._last = stream
