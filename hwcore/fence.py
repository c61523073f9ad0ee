"""StreamFence: memory that several streams share, read side by side and written alone."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from hwcore.errors import ArgumentValueError, CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from hwcore.backend import Backend
    from hwcore.types import Event, Stream

__all__ = ["StreamFence"]

_MANY_EVENTS = 64  # streams that come and go leave theirs behind


class StreamFence:
    """Orders reads and writes of memory that several streams share.

    A read waits for writes of other streams, a write for their reads and writes: the edges
    read-after-write, write-after-read and write-after-write, on any backend. A stream waits for
    the point at which the other's block ended, not for what that stream was given afterwards, and
    the host waits for nothing.

    Parameters
    ----------
    backend : Backend, optional
        By default the process's own.
    device : torch.device, optional
        Whose streams; by default the current one at each call.
    memory : sequence of Tensor
        What is shared, where it may be freed while streams still work on it: the allocator is told
        of each.

    Examples
    --------
    The forward reads ``req_to_token`` on its own stream; the scheduler gives a row away:

    >>> fence = StreamFence()
    >>> with hw.stream_context(forward_stream), fence.reading():
    ...     forward(req_to_token)
    >>> with fence.writing():
    ...     req_to_token[freed_row] = new_slots

    Notes
    -----
    Blocks of several threads come one after the other; a block inside another of the same fence
    is an error. A block that raises ends like any other, for what it had submitted will run.
    Cost: one ``record_event`` a block, and one ``wait_event`` for each other stream that is to be
    waited for. Within a graph capture blocks are refused: an event of a capture means nothing
    outside.
    """

    def __init__(
        self,
        backend: Backend | None = None,
        device: torch.device | None = None,
        memory: Sequence[torch.Tensor] = (),
    ) -> None:
        from hwcore.activation import current_backend

        self._backend = backend or current_backend()
        self._device = device
        self._memory = tuple(memory)
        self._lock = threading.RLock()
        self._entered = False
        # Recording an event again moves it. One a stream is enough, for a stream's later record
        # includes its earlier; one for all streams would forget all but the last.
        self._events: dict[tuple[str, Stream], Event] = {}
        # A write has waited for every access before it: who waits for it waits for all.
        self._writer: Stream | None = None
        self._written: Event | None = None
        self._reads: dict[Stream, Event] = {}  # since that write

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Give the current stream a block in which it reads."""
        with self._block() as stream:
            self.begin_read(stream)
            try:
                yield
            finally:
                self.end_read(stream)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Give the current stream a block in which it reads and writes."""
        with self._block() as stream:
            self.begin_write(stream)
            try:
                yield
            finally:
                self.end_write(stream)

    # The parts of both, for callers with a lock of their own and no time for a context manager.

    def begin_read(self, stream: Stream) -> None:
        """Make a stream wait for the last write of another."""
        writer, written = self._writer, self._written
        if written is not None and writer is not stream and writer != stream:
            self._backend.wait_event(written, stream)

    def end_read(self, stream: Stream) -> None:
        """Mark the end of a stream's reads."""
        event = self._reads[stream] = self._event("read", stream)
        self._backend.record_event(event, stream)

    def begin_write(self, stream: Stream) -> None:
        """Make a stream wait for the last write and the reads since, of others."""
        self.begin_read(stream)
        for reader, event in self._reads.items():
            if reader != stream:
                self._backend.wait_event(event, stream)

    def end_write(self, stream: Stream) -> None:
        """Mark the end of a stream's writes."""
        if self._reads:
            self._reads.clear()
        if self._written is None or (self._writer is not stream and self._writer != stream):
            self._writer, self._written = stream, self._event("write", stream)
        self._backend.record_event(self._written, stream)

    def _event(self, kind: str, stream: Stream) -> Event:
        event = self._events.get((kind, stream))
        if event is None:
            if len(self._events) >= _MANY_EVENTS:
                self._forget_superseded()
            for tensor in self._memory:
                self._backend.record_stream(tensor, stream)
            event = self._events[kind, stream] = self._backend.create_event(stream.device)
        return event

    def _forget_superseded(self) -> None:
        used = {id(event) for event in (self._written, *self._reads.values())}
        self._events = {key: event for key, event in self._events.items() if id(event) in used}

    @contextlib.contextmanager
    def _block(self) -> Iterator[Stream]:
        with self._lock:
            if self._backend.is_capturing():
                message = (
                    "StreamFence: a block was entered inside a graph capture; expected it outside, "
                    "for others wait for its end. Put the capture, or the replay, into the block."
                )
                raise CaptureError(message)
            if self._entered:
                message = (
                    "StreamFence: a block was entered inside another of the same fence; expected "
                    "one at a time, for the outer one's end is what others wait for. "
                    "Put the reads into the writing() block."
                )
                raise ArgumentValueError(message)
            self._entered = True
            try:
                yield self._backend.current_stream(self._device)
            finally:
                self._entered = False
