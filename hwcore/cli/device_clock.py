"""How long work takes that a device does behind the host's back: two ways to measure it.

The host's clock, around many calls and one wait, is what an engine sees that makes these calls.
Where calls are short it is the time to launch them. The device's own clock sees the work alone: the
calls are captured in a graph, so that the host is ahead however short they are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import hwcore
from hwcore.cli.measurement import NotMeasuredError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hwcore.backend import Backend

__all__ = ["DeviceClock", "accelerator", "simulated"]


def accelerator() -> Backend:
    """Return the process's backend, if its device works while the host goes on.

    Raises
    ------
    NotMeasuredError
        If it does not.
    """
    hw = hwcore.current_backend()
    if "async_streams" not in hw.info.capabilities:
        message = (
            f"needs an accelerator, and the backend `{hw.info.name}` does all work as it is "
            "submitted. Install an accelerator's plugin, or name one with HWCORE_BACKEND"
        )
        raise NotMeasuredError(message)
    return hw


def simulated(hw: Backend) -> bool:
    """Return whether a backend stands in for a device, so that its figures say nothing of any.

    A device that is there is selected automatically; what stands in for one, by its name alone.
    """
    return not hw.info.automatic


class DeviceClock:
    """Measures calls that submit work to the current stream.

    Parameters
    ----------
    hw : Backend

    Raises
    ------
    NotMeasuredError
        If the device's events take no time.
    """

    def __init__(self, hw: Backend) -> None:
        if "event_timing" not in hw.info.capabilities:
            message = f"needs events with times, which the backend `{hw.info.name}` has not"
            raise NotMeasuredError(message)
        self._hw = hw
        self._begin, self._end = (hw.create_event(enable_timing=True) for _ in range(2))

    def by_host(self, call: Callable[[], object], calls: int) -> Callable[[], float]:
        """Return a measurement: seconds of a call, of so many and one wait of the host."""

        def measure() -> float:
            for _ in range(min(3, calls)):
                call()  # what ran before has taken the caches
            self._hw.synchronize()
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            self._hw.synchronize()
            return (time.perf_counter() - begun) / calls

        return measure

    def on_device(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        """Return a measurement: the device's seconds for one of the calls, without their launch.

        The calls must bear capture in a graph.
        """
        for call in calls:
            call()  # compiles and allocates what a capture must not
        self._hw.synchronize()
        graph = self._hw.create_graph()
        outputs: Any = self._hw.graph_capture(graph, lambda: [call() for call in calls])

        def measure() -> float:
            hw = self._hw
            graph.replay()  # so that the host is ahead of what is measured
            hw.record_event(self._begin)
            graph.replay()
            hw.record_event(self._end)
            hw.synchronize_event(self._end)
            assert outputs is not None  # the graph writes to them: they live as long
            return self._begin.elapsed_time(self._end) / 1e3 / len(calls)

        return measure
