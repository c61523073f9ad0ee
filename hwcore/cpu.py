"""The built-in CPU backend: a plugin like any other, written against the contract alone.

The host has no streams, so streams and events here are inert: work is done by the time a call
returns. They keep the identity and the whole method surface of real ones, so that no caller needs
a branch. Graphs are the contract's default, the tape.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import threading
import time
from typing import TYPE_CHECKING

from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    describe,
    no_interprocess_events,
)
from hwcore.hookspecs import API_VERSION, hookimpl
from hwcore.types import Availability, BackendInfo, CompilePolicy, MemoryInfo

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from hwcore.types import CompileRequest, Stream

__all__ = ["CpuEvent", "CpuPlugin", "CpuStream"]


class CpuStream:
    """A stream with nothing in it: what was submitted has been done.

    Parameters
    ----------
    device : torch.device
    priority : int
        Kept, and without effect.
    """

    _ids = itertools.count(1)

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.device = device
        self.priority = priority
        self.stream_id = next(CpuStream._ids)

    def __repr__(self) -> str:
        return f"<hwcore CpuStream {self.stream_id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuStream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash((CpuStream, self.stream_id))

    def __enter__(self) -> CpuStream:
        _streams.entered.append(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _streams.entered.pop()

    def query(self) -> bool:
        """Say that all work is done."""
        return True

    def synchronize(self) -> None:
        """Return at once."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """Record ``event``, or a new one, and return it."""
        event = CpuEvent(self.device) if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: CpuEvent) -> None:
        """Return at once."""

    def wait_stream(self, stream: Stream) -> None:
        """Return at once."""


class CpuEvent:
    """An event that is reached as soon as it is recorded.

    Parameters
    ----------
    device : torch.device
    enable_timing : bool
        Needed for :meth:`elapsed_time`, as on a device.
    """

    def __init__(self, device: torch.device, enable_timing: bool = False) -> None:
        self.device = device
        self.enable_timing = enable_timing
        self._recorded_ns: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Record the event; recording it again moves it."""
        if self.enable_timing:
            self._recorded_ns = time.perf_counter_ns()

    def wait(self, stream: Stream | None = None) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Say that the event was reached; True for one never recorded, as on a device."""
        return True

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, end_event: CpuEvent) -> float:
        """Return the time from this event to ``end_event``, in milliseconds.

        Raises
        ------
        ArgumentValueError
            If either was made without ``enable_timing``, or not recorded.
        """
        for name, event in (("this event", self), ("`end_event`", end_event)):
            if not isinstance(event, CpuEvent):
                fix = "Pass an event of create_event()"
                raise ArgumentTypeError(
                    describe("elapsed_time", name, event, "an event of the cpu backend", fix)
                )
            if not event.enable_timing or event._recorded_ns is None:
                expected = "an event made with enable_timing=True and recorded"
                fix = "Make it with create_event(enable_timing=True) and record it"
                raise ArgumentValueError(describe("elapsed_time", name, event, expected, fix))
        assert self._recorded_ns is not None
        assert end_event._recorded_ns is not None
        return (end_event._recorded_ns - self._recorded_ns) / 1e6


class _Streams(threading.local):
    """The streams that the calling thread has entered, innermost last."""

    def __init__(self) -> None:
        self.entered: list[CpuStream] = []


_streams = _Streams()


class CpuPlugin:
    """The hooks of the CPU."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="cpu",
            device_type="cpu",
            vendor="the host",
            api_version=API_VERSION,
            priority=0,
            capabilities=frozenset({"event_timing", "graphs", "float64", "float8"}),
            quirks=frozenset({"unindexed_device", "capture_executes"}),
        )

    @hookimpl
    def probe(self) -> Availability:
        return Availability(ok=True)

    @hookimpl
    def setup(self) -> None:
        import torch

        self._device = torch.device("cpu")
        self._default_stream = CpuStream(self._device)

    @hookimpl
    def device_string(self, index: int | None = None) -> str:
        return "cpu"

    @hookimpl
    def device_count(self) -> int:
        return 1

    @hookimpl
    def is_initialized(self) -> bool:
        return False  # a fork breaks nothing

    @hookimpl
    def set_device(self, index: int) -> None:
        pass

    @hookimpl
    def memory_info(self, index: int | None = None) -> MemoryInfo:
        return host_memory()

    @hookimpl
    def generator(self, index: int | None = None) -> torch.Generator:
        import torch

        return torch.Generator(self._device)

    @hookimpl
    def synchronize(self, device: torch.device | None = None) -> None:
        pass

    @hookimpl
    def create_stream(self, device: torch.device | None = None, priority: int = 0) -> CpuStream:
        return CpuStream(self._device, priority)

    @hookimpl
    def create_event(
        self,
        device: torch.device | None = None,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
    ) -> CpuEvent:
        if interprocess:
            raise no_interprocess_events(self._device.type)
        return CpuEvent(self._device, enable_timing)

    @hookimpl
    def current_stream(self, device: torch.device | None = None) -> CpuStream:
        entered = _streams.entered
        return entered[-1] if entered else self._default_stream

    @hookimpl
    def record_event(self, event: CpuEvent, stream: Stream | None = None) -> None:
        if event.enable_timing:  # called per step: do not pass through a second method for nothing
            event.record(stream)

    @hookimpl
    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        pass  # torch raises for host tensors

    @hookimpl
    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    @hookimpl
    def compile_policy(self, request: CompileRequest) -> CompilePolicy:
        reason = "on the CPU, eager was measured 2 to 7 times faster on the core's small gathers"
        return CompilePolicy(enabled=False, reason=reason)

    @hookimpl
    def distributed_backend(self) -> str:
        return "gloo"


def host_memory() -> MemoryInfo:
    """Return what this process may use: the machine's memory, within its control group's limit."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    # MemAvailable counts caches that give way; the line is Linux's, hence the fallback above.
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Files that were read count as used until somebody needs the memory.
        lines = (group / "memory.stat").read_text().splitlines()
        used -= int(dict(line.split() for line in lines).get("inactive_file", 0))
    except (OSError, ValueError):  # no control group, or one that says "max"
        pass
    else:
        total = min(total, limit)
        free = min(free, max(limit - used, 0))
    return MemoryInfo(free_bytes=min(free, total), total_bytes=total)
