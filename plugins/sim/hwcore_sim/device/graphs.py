"""Graphs of the simulated device: work recorded once, run by each replay at the same addresses."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CapabilityError,
    CaptureError,
    describe,
)
from hwcore_sim.device.registration import device_type, native, stream_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hwcore.types import Stream

__all__ = [
    "Graph",
    "GraphPool",
    "capture_stream_limit",
    "graph_pool",
    "is_capturing",
    "set_capture_stream_limit",
    "streams_left",
]

T = TypeVar("T")

_idle_streams: dict[int, list[torch.Stream]] = {}
"""By device: streams for captures where the caller names none. The last is taken first, so there
are as many as captures ran at once."""


class GraphPool:
    """Memory that several graphs share. Replays of these graphs must not overlap.

    It goes back to the device once the last of them is closed.
    """

    def __init__(self) -> None:
        self._native = native().Pool()


def graph_pool() -> GraphPool:
    """Return a new pool for :meth:`Graph.capture`."""
    return GraphPool()


def is_capturing() -> bool:
    """Say whether the calling thread's current stream is being captured."""
    return bool(native().is_capturing())


def capture_stream_limit() -> int:
    """Return how many capture streams all open graphs may hold together."""
    return int(native().capture_stream_limit())


def set_capture_stream_limit(limit: int) -> None:
    """Change the number of capture streams; graphs that exist keep theirs."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        expected, fix = "a number ≥ 0", "Pass one"
        raise ArgumentValueError(
            describe("set_capture_stream_limit", "`limit`", limit, expected, fix)
        )
    native().set_capture_stream_limit(limit)


def streams_left() -> int:
    """Return how many capture streams are left for further graphs."""
    return int(native().capture_streams_left())


class Graph:
    """Device work, recorded by ``capture`` and run by ``replay``.

    Capturing runs nothing: outputs hold values only after the first replay. Every address is
    frozen, so inputs are changed in place. Memory that the captured function allocates belongs to
    the graph until ``close``. Random numbers are drawn anew by each replay, from the generator of
    the captured call.

    A stream that waits for an event recorded inside the capture takes part in it, and must be
    waited for at the end. Each stream that took part is held until ``close``.
    """

    def __init__(self) -> None:
        self._native: Any = None
        self._outputs: Any = None
        self._closed = False

    def capture(
        self,
        fn: Callable[[], T],
        stream: Stream | None = None,
        pool: GraphPool | None = None,
    ) -> T:
        """Record the device work of ``fn()``.

        Parameters
        ----------
        fn : callable without arguments
            Called exactly once.
        stream : torch.Stream, optional
            Where to capture; default: a stream kept for it, another one in each thread.
        pool : GraphPool, optional
            Memory to share with other graphs.

        Returns
        -------
        outputs
            What fn returned. Each replay writes into these very tensors.

        Raises
        ------
        CaptureError
            If fn does what a graph cannot hold: waits for the device, reads a value on the host,
            copies from memory that is not pinned, makes a shape that depends on values, captures
            or replays a graph, forks to a stream without joining it. If the graph is not empty,
            or no capture stream is left. The graph is empty afterwards, the device usable.
        """
        if not callable(fn):
            fix = "Pass a function"
            expected = "a callable without arguments"
            raise ArgumentTypeError(describe("Graph.capture", "`fn`", fn, expected, fix))
        if pool is not None and not isinstance(pool, GraphPool):
            fix = "Make one with graph_pool()"
            raise ArgumentTypeError(describe("Graph.capture", "`pool`", pool, "a GraphPool", fix))
        if self._closed or self._native is not None:
            state = "closed" if self._closed else "captured already"
            _misuse(f"Graph.capture: the graph is {state}; expected an empty one. Make a new Graph")
        with _capture_stream() if stream is None else contextlib.nullcontext(stream) as chosen:
            return self._capture(fn, chosen, pool)

    def _capture(self, fn: Callable[[], T], stream: Stream, pool: GraphPool | None) -> T:
        key = stream_key("Graph.capture", stream)
        graph = native().Graph(pool._native if pool is not None else native().Pool())
        with stream:
            graph.begin(*key)
            try:
                outputs = fn()
            except BaseException as error:
                fault = graph.fault
                graph.abort()
                if fault and isinstance(error, Exception) and not isinstance(error, CaptureError):
                    _misuse(_refused(fault), error)
                raise
            graph.end()  # empties the graph if it raises
        self._native = graph
        self._outputs = outputs
        return outputs

    def replay(self) -> Any:
        """Submit the recorded work to the current stream, and return the captured outputs.

        Raises
        ------
        CaptureError
            If nothing was captured, the graph was closed, the current stream is being captured, or
            another device than the graph's is current.
        """
        if self._native is None:
            state = "closed" if self._closed else "empty"
            fix = "Call capture(fn) on a new Graph first"
            _misuse(f"Graph.replay: the graph is {state}; expected a captured one. {fix}")
        self._native.replay()
        return self._outputs

    def close(self) -> None:
        """Give the graph's memory and streams back; replays that are queued still run."""
        if self._native is not None:
            self._native.close()
        self._native = self._outputs = None
        self._closed = True


@contextlib.contextmanager
def _capture_stream() -> Iterator[torch.Stream]:
    """Lend a stream to one capture."""
    index = native().current_device()
    idle = _idle_streams.setdefault(index, [])
    stream = None
    while stream is None and idle:
        with contextlib.suppress(IndexError, CapabilityError):  # taken, or from before a reset
            candidate = idle.pop()
            native().stream_policy(index, candidate.stream_id)
            stream = candidate
    if stream is None:
        stream = torch.Stream(torch.device(device_type(), index))
    try:
        yield stream
    finally:
        idle.append(stream)


def _refused(fault: str) -> str:
    expected = "device work alone, of shapes and addresses that are known beforehand"
    return f"Graph.capture: fn {fault}; expected {expected}. Move it out of the captured function"


def _misuse(message: str, cause: BaseException | None = None) -> NoReturn:
    message += "."
    raise CaptureError(message) from cause
