"""The default of every optional hook, on torch's generic device API.

One instance is bound to one backend and stands in for the hooks that its plugin lacks. Nothing
here knows a device: what it is told is the device type, and what torch offers for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from hwcore.errors import CapabilityError, no_interprocess_events
from hwcore.graphs import tape
from hwcore.hookspecs import hookimpl
from hwcore.types import (
    BackendInfo,
    CompilePolicy,
    CompileRequest,
    Event,
    HostMemoryPolicy,
    HostRegistration,
    MemoryInfo,
    PlanStreamPolicy,
    ReplayBatch,
    Stream,
    TransferEngineSpec,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

__all__ = ["Defaults"]


class Defaults:
    """Defaults for a backend. The hooks' meanings are in :mod:`hwcore.hookspecs`."""

    def __init__(self, info: BackendInfo) -> None:
        self._info = info
        self._device_type = info.device_type

    def _device(self, device: torch.device | None) -> torch.device:
        return torch.device(self._device_type) if device is None else device

    def _module(self, hook: str, name: str) -> Any:
        """Return a function of the torch device module, or say which hook makes up for it."""
        module = torch.get_device_module(self._device_type)
        if (function := getattr(module, name, None)) is None:
            message = (
                f"backend `{self._info.name}`: hook `{hook}` has a default that needs "
                f"`{module.__name__}.{name}`, which this torch does not have. "
                f"Implement `{hook}` in the plugin."
            )
            raise CapabilityError(message)
        return function

    @hookimpl
    def setup(self) -> None:
        pass

    # --- Devices ---

    @hookimpl
    def device_string(self, index: int | None = None) -> str:
        return self._device_type if index is None else f"{self._device_type}:{index}"

    @hookimpl
    def device_count(self) -> int:
        return cast("int", self._module("device_count", "device_count")())

    @hookimpl
    def is_initialized(self) -> bool:
        module = torch.get_device_module(self._device_type)
        # A module that cannot tell is taken as live: the error names the way out, a fork that
        # goes on with a dead context does not.
        return bool(getattr(module, "is_initialized", lambda: True)())

    @hookimpl
    def set_device(self, index: int) -> None:
        self._module("set_device", "set_device")(index)

    @hookimpl
    def memory_info(self, index: int | None = None) -> MemoryInfo:
        free, total = self._module("memory_info", "mem_get_info")(index)
        return MemoryInfo(free_bytes=free, total_bytes=total)

    @hookimpl
    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    @hookimpl
    def generator(self, index: int | None = None) -> torch.Generator:
        device = self._device_type if index is None else f"{self._device_type}:{index}"
        return torch.Generator(device)

    @hookimpl
    def synchronize(self, device: torch.device | None = None) -> None:
        self._module("synchronize", "synchronize")(device)

    # --- Streams and events ---

    @hookimpl
    def create_stream(self, device: torch.device | None = None, priority: int = 0) -> Stream:
        return torch.Stream(self._device(device), priority=priority)

    @hookimpl
    def create_event(
        self,
        device: torch.device | None = None,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
    ) -> Event:
        if interprocess:
            raise no_interprocess_events(self._device_type)
        return torch.Event(self._device(device), enable_timing=enable_timing, blocking=blocking)

    @hookimpl
    def current_stream(self, device: torch.device | None = None) -> Stream:
        return torch.accelerator.current_stream(device)

    @hookimpl
    def stream_context(self, stream: Stream) -> AbstractContextManager[Any]:
        return stream

    @hookimpl
    def record_event(self, event: Event, stream: Stream | None = None) -> None:
        event.record(stream)

    @hookimpl
    def wait_event(self, event: Event, stream: Stream | None = None) -> None:
        event.wait(stream)

    @hookimpl
    def wait_stream(self, waiter: Stream, producer: Stream) -> None:
        waiter.wait_stream(producer)

    @hookimpl
    def synchronize_stream(self, stream: Stream) -> None:
        stream.synchronize()

    @hookimpl
    def synchronize_event(self, event: Event) -> None:
        event.synchronize()

    @hookimpl
    def query_event(self, event: Event) -> bool:
        return event.query()

    @hookimpl
    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        tensor.record_stream(cast("torch.Stream", stream))

    # --- Compilation and operators ---

    @hookimpl
    def compile_policy(self, request: CompileRequest) -> CompilePolicy:
        reason = f"the plugin of `{self._info.name}` names no compiler (hook compile_policy)"
        return CompilePolicy(enabled=False, reason=reason)

    @hookimpl
    def needs_cpu_fallback(self, tensor: torch.Tensor, purpose: str) -> bool:
        return purpose in ("serialize", "numpy") and tensor.device.type != "cpu"

    @hookimpl
    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        return {}

    # --- Host memory ---

    @hookimpl
    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()

    @hookimpl
    def register_host_memory(self, buffer: memoryview) -> HostRegistration | None:
        return None

    @hookimpl
    def host_memory_policy(self) -> HostMemoryPolicy:
        return HostMemoryPolicy()

    # --- Graphs ---

    @hookimpl
    def create_graph(self) -> tape.Tape:
        return tape.Tape()

    @hookimpl
    def graph_pool(self) -> None:
        return None

    @hookimpl
    def graph_capture(
        self, graph: tape.Tape, fn: Callable[[], Any], pool: Any = None, stream: Any = None
    ) -> Any:
        if stream is None:
            return graph.capture(fn)
        with stream:
            return graph.capture(fn)

    @hookimpl
    def is_capturing(self) -> bool:
        return tape.is_capturing()

    @hookimpl
    def graph_replay(
        self,
        graph: Any,
        buffers: Mapping[str, torch.Tensor] | None = None,
        batch: ReplayBatch | None = None,
    ) -> None:
        graph.replay()

    @hookimpl
    def plan_stream_policy(self) -> PlanStreamPolicy:
        return PlanStreamPolicy()

    # --- Other processes ---

    @hookimpl
    def distributed_backend(self) -> str:
        message = (
            f"backend `{self._info.name}`: distributed_backend() has no default for an "
            f"accelerator, for a wrong one would work and be slow. "
            f"Implement the hook in the plugin, or pass the backend to init_process_group."
        )
        raise CapabilityError(message)

    @hookimpl
    def transfer_engines(self) -> Sequence[TransferEngineSpec]:
        return (
            TransferEngineSpec(name="shm", protocol="memfd"),
            TransferEngineSpec(
                name="mooncake",
                protocol="tcp",
                package="hwcore[mooncake]",
            ),
        )
