"""Hooks on the module that torch has for a device type, in the classes that its users know.

The defaults (:mod:`hwcore.defaults`) use torch's device-free classes. Where a device's module has
streams and events of its own, programs and libraries for the device expect those, and some things
only they can do: torch's device-free event takes ``blocking`` and does nothing about it. Mixing the
two is worse than either, for a stream is not equal to the same stream in the other class.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from hwcore.errors import ArgumentValueError, CapabilityError, describe
from hwcore.hookspecs import hookimpl
from hwcore.types import CompilePolicy, MemoryInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    import torch

    from hwcore.graphs.native import Graph
    from hwcore.graphs.native_captures import Captures
    from hwcore.types import Event, Stream

__all__ = ["DeviceModuleHooks", "NativeGraphHooks", "inductor_policy", "triton_kernels"]

_log = logging.getLogger("hwcore")


class DeviceModuleHooks:
    """Hooks for a plugin to derive from. Their meanings are in :mod:`hwcore.hookspecs`.

    Parameters
    ----------
    device_type : str
        The device type, of which torch has a module.
    plugin : str
        The distribution, for messages.
    """

    def __init__(self, device_type: str, plugin: str) -> None:
        self._device_type = device_type
        self._plugin = plugin
        self._module: Any = None

    def start(self, vanished: str) -> None:
        """Take torch's module of the device, for the plugin's ``setup``.

        Parameters
        ----------
        vanished : str
            What to do where there is no device, though ``probe`` saw one; an imperative sentence.

        Raises
        ------
        CapabilityError
            If torch sees no device.
        """
        import torch

        module = torch.get_device_module(self._device_type)
        self._count = module.device_count()
        if self._count < 1:
            message = (
                f"{self._plugin}: setup got {self._count} devices from {module.__name__}."
                f"device_count(); expected at least 1, since probe() found one before. {vanished}."
            )
            raise CapabilityError(message)
        self._module = module
        self._current_stream = module.current_stream
        self._stream_context = module.stream

    # --- Devices ---

    @hookimpl
    def device_string(self, index: int | None = None) -> str:
        return self._device_type if index is None else f"{self._device_type}:{self._checked(index)}"

    @hookimpl
    def set_device(self, index: int) -> None:
        self._module.set_device(self._checked(index))

    @hookimpl
    def memory_info(self, index: int | None = None) -> MemoryInfo:
        free, total = self._module.mem_get_info(self._checked(index))
        return MemoryInfo(free_bytes=free, total_bytes=total)

    @hookimpl
    def generator(self, index: int | None = None) -> torch.Generator:
        import torch

        return torch.Generator(self.device_string(index))

    # --- Streams and events ---

    @hookimpl
    def create_stream(self, device: torch.device | None = None, priority: int = 0) -> Stream:
        stream: Stream = self._module.Stream(self._checked_device(device), priority)
        return stream

    @hookimpl
    def create_event(
        self,
        device: torch.device | None = None,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
    ) -> Event:
        # The event is made when it is first recorded, on the device of that stream.
        self._checked_device(device)
        if enable_timing and interprocess:
            expected, fix = "one of both, for runtimes have none that does both", "Make two events"
            got = "enable_timing=True, interprocess=True"
            what = "create_event: arguments"
            raise ArgumentValueError(describe(self._plugin, what, got, expected, fix))
        event: Event = self._module.Event(
            enable_timing=enable_timing, blocking=blocking, interprocess=interprocess
        )
        return event

    @hookimpl
    def current_stream(self, device: torch.device | None = None) -> Stream:
        stream: Stream = self._current_stream(device)
        return stream

    @hookimpl
    def stream_context(self, stream: Stream) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._stream_context(stream)
        return context

    @hookimpl
    def record_event(self, event: Event, stream: Stream | None = None) -> None:
        try:
            event.record(stream)
        except RuntimeError as error:
            self._refuse_event(event, stream, error)
            raise

    # --- Checks ---

    def _checked(self, index: int | None) -> int | None:
        """Return an index that exists; a device's own error for it comes late and names nothing."""
        if index is None or (isinstance(index, int) and 0 <= index < self._count):
            return index
        expected = f"an index from 0 to {self._count - 1}: torch sees {self._count} devices"
        fix = "Name one of them, or look at what hides the others"
        raise ArgumentValueError(describe(self._plugin, "`index`", index, expected, fix))

    def _checked_device(self, device: torch.device | None) -> torch.device | None:
        if device is not None:
            if device.type != self._device_type:
                expected = f"a device of type `{self._device_type}`"
                fix = "Take it from Backend.device()"
                raise ArgumentValueError(describe(self._plugin, "`device`", device, expected, fix))
            self._checked(device.index)
        return device

    def _refuse_event(self, event: Event, stream: Stream | None, error: Exception) -> None:
        """Raise if an event could not be recorded because it belongs to another device."""
        at = (self._current_stream() if stream is None else stream).device
        device = getattr(event, "device", None)
        if device is not None and device != at:
            expected = f"an event of {at}, where the stream is: it was recorded there before"
            fix = "Make one event for each device, with create_event(device)"
            message = describe(self._plugin, "`event`", device, expected, fix)
            raise ArgumentValueError(message) from error


class NativeGraphHooks:
    """Graph hooks, for a plugin whose device captures by itself.

    ``setup`` of the plugin sets ``_captures``.
    """

    _captures: Captures

    @hookimpl
    def create_graph(self) -> Graph:
        from hwcore.graphs.native import Graph

        return Graph(self._captures)

    @hookimpl
    def graph_pool(self) -> Any:
        return self._captures.pool()

    @hookimpl
    def graph_capture(
        self, graph: Graph, fn: Callable[[], Any], pool: Any = None, stream: Stream | None = None
    ) -> Any:
        return graph.capture(fn, pool, stream)

    @hookimpl
    def is_capturing(self) -> bool:
        return self._captures.is_capturing()


def inductor_policy() -> CompilePolicy:
    """Return the policy of a device that inductor writes Triton for: off where there is none."""
    if importlib.util.find_spec("triton") is None:
        reason = "inductor needs Triton, which is not installed: `pip install triton`"
        return CompilePolicy(enabled=False, reason=reason)
    return CompilePolicy(enabled=True, reason="inductor has a code generator for it")


@functools.cache
def triton_kernels(backend: str) -> Mapping[str, Callable[..., Any]]:
    """Return the core's Triton kernels; without Triton none, which is said once.

    Parameters
    ----------
    backend : str
        Who asks, for the message.
    """
    try:
        triton = importlib.import_module("hwcore.kernels.triton")
        kernels: Mapping[str, Callable[..., Any]] = triton.kernels()
    except (ImportError, CapabilityError) as error:
        _log.warning(
            "backend %s runs the portable kernels, not the Triton ones: %s", backend, error
        )
        return {}
    return kernels
