"""The hooks of the NPU. What it shares with other devices is left to the contract's defaults."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import hwcore
from hwcore.errors import ArgumentValueError, CapabilityError, describe
from hwcore.types import (
    Availability,
    BackendInfo,
    CompilePolicy,
    HostMemoryPolicy,
    MemoryInfo,
    PlanStreamPolicy,
    TransferEngineSpec,
)
from hwcore_npu import probe, torch_build

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from hwcore.types import Capability, CompileRequest, Event, ReplayBatch, Stream
    from hwcore_npu.graphs import Graph

__all__ = ["NpuPlugin"]

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


class NpuPlugin:
    """Huawei Ascend NPUs, through torch_npu."""

    @hwcore.hookimpl
    def backend_info(self) -> BackendInfo:
        capabilities: list[Capability] = ["async_streams", "event_timing", "graphs"]
        capabilities += ["pinned_memory", "device_direct_transfer"]
        if not os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "").isdigit():  # not one alone
            capabilities.append("multi_device")
        return BackendInfo(
            name="npu",
            device_type="npu",
            vendor="Huawei Ascend",
            api_version="1.0",
            capabilities=frozenset(capabilities),
            quirks=frozenset({"capture_stream_limit"}),
        )

    @hwcore.hookimpl
    def probe(self) -> Availability:
        return probe.availability()

    @hwcore.hookimpl
    def setup(self) -> None:
        import torch

        where = "npu: setup"
        if problem := torch_build.problem():
            message = f"{where}: {problem[0]}. {problem[1]}."
            raise CapabilityError(message)
        other = torch.accelerator.current_accelerator()
        if other is not None and other.type != "npu":
            fix = f"Unload the extension of `{other.type}`, or run on it with HWCORE_BACKEND"
            what, expected = "this process's accelerator", "none, for torch takes one a process"
            raise CapabilityError(describe(where, what, other.type, expected, fix))
        before = os.environ.get(_AUTOLOAD)
        try:
            import torch_npu  # noqa: F401
        except Exception as error:
            message = (
                f"{where}: `import torch_npu` failed: {_causes(error)}. "
                f"Run `source set_env.sh` of the CANN toolkit, then `hwcore doctor`."
            )
            raise CapabilityError(message) from error
        finally:  # torch_npu sets it, and a failed import leaves it to all children
            if before is None:
                os.environ.pop(_AUTOLOAD, None)
            else:
                os.environ[_AUTOLOAD] = before
        self._npu: Any = torch.get_device_module("npu")
        self._count: int = self._npu.device_count()
        if self._count < 1:
            fix = "See whether `npu-smi info` still lists the device"
            expected = "at least 1, as the probe saw"
            raise CapabilityError(describe(where, "device_count()", self._count, expected, fix))

    # --- Devices ---

    @hwcore.hookimpl
    def device_string(self, index: int | None = None) -> str:
        if index is None:
            return "npu"
        if not 0 <= index < self._count:
            expected = f"0 to {self._count - 1}, for this process sees {self._count}"
            fix = "Name one of them, or change ASCEND_RT_VISIBLE_DEVICES"
            raise ArgumentValueError(describe("npu", "a device index", index, expected, fix))
        return f"npu:{index}"

    @hwcore.hookimpl
    def set_device(self, index: int) -> None:
        self._npu.set_device(self.device_string(index))

    @hwcore.hookimpl
    def memory_info(self, index: int | None = None) -> MemoryInfo:
        free, total = self._npu.mem_get_info(self.device_string(index))
        return MemoryInfo(free_bytes=free, total_bytes=total)

    @hwcore.hookimpl
    def generator(self, index: int | None = None) -> torch.Generator:
        import torch

        return torch.Generator(self.device_string(index))

    # --- Streams and events: torch_npu's own, which its graphs and its allocator know ---

    @hwcore.hookimpl
    def create_stream(self, device: torch.device | None = None, priority: int = 0) -> Any:
        return self._npu.Stream(self._known(device), priority=priority)

    @hwcore.hookimpl
    def create_event(
        self,
        device: torch.device | None = None,
        enable_timing: bool = False,
        blocking: bool = False,
    ) -> Any:
        with self._npu.device(self._known(device)):
            return self._npu.Event(enable_timing=enable_timing, blocking=blocking)

    @hwcore.hookimpl
    def current_stream(self, device: torch.device | None = None) -> Any:
        return self._npu.current_stream(device)

    @hwcore.hookimpl
    def stream_context(self, stream: Stream) -> Any:
        return self._npu.stream(stream)

    @hwcore.hookimpl
    def record_event(self, event: Event, stream: Stream | None = None) -> None:
        try:
            event.record(stream)
        except RuntimeError as error:
            here = (stream or self._npu.current_stream()).device
            if (got := getattr(event, "device", None)) == here:
                raise
            expected, fix = f"one of {here}, as the stream", "Make it with create_event(device)"
            message = describe("npu: record_event", "the event's device", got, expected, fix)
            raise ArgumentValueError(message) from error

    def _known(self, device: torch.device | None) -> torch.device | None:
        if device is not None and device.index is not None:
            self.device_string(device.index)  # raises
        return device

    # --- Policies ---

    @hwcore.hookimpl
    def compile_policy(self, request: CompileRequest) -> CompilePolicy:
        reason = "on the NPU inductor needs triton-ascend, and was seen to fail in the first step"
        return CompilePolicy(enabled=False, reason=reason)

    @hwcore.hookimpl
    def host_memory_policy(self) -> HostMemoryPolicy:
        # vllm-ascend 15719 and 15746: a pinned block was handed out before the copy from it had
        # run, and kernels did not wait for copies of their own stream.
        return HostMemoryPolicy(can_pin=True)

    @hwcore.hookimpl
    def plan_stream_policy(self) -> PlanStreamPolicy:
        return PlanStreamPolicy(recompute_after_join=frozenset({"mrope_positions"}))

    @hwcore.hookimpl
    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        """Return the operators in ``torch.ops.npu`` of the core's own names and arguments."""
        import torch

        from hwcore.kernels import references

        found = {}
        for name, reference in references().items():
            own = getattr(getattr(torch.ops.npu, name, None), "default", None)
            if own is not None and [a.name for a in own._schema.arguments] == [
                p.name
                for p in inspect.signature(reference).parameters.values()
                if p.kind is not p.KEYWORD_ONLY
            ]:
                found[name] = own
        return found

    # --- Graphs ---

    @hwcore.hookimpl
    def create_graph(self) -> Graph:
        from hwcore_npu.graphs import Graph

        return Graph(self._npu)

    @hwcore.hookimpl
    def graph_pool(self) -> Any:
        return self._npu.graph_pool_handle()

    @hwcore.hookimpl
    def graph_capture(
        self, graph: Graph, fn: Callable[[], Any], pool: Any = None, stream: Stream | None = None
    ) -> Any:
        return graph.capture(fn, pool, stream)

    @hwcore.hookimpl
    def is_capturing(self) -> bool:
        return bool(self._npu.is_current_stream_capturing())

    @hwcore.hookimpl
    def graph_replay(
        self,
        graph: Graph,
        buffers: Mapping[str, torch.Tensor] | None = None,
        batch: ReplayBatch | None = None,
    ) -> None:
        graph.replay(buffers or {}, batch)

    # --- Other processes ---

    @hwcore.hookimpl
    def distributed_backend(self) -> str:
        return "hccl"

    @hwcore.hookimpl
    def transfer_engines(self) -> Sequence[TransferEngineSpec]:
        package = "mooncake-transfer-engine-npu"
        return (
            TransferEngineSpec(name="shm", protocol="memfd"),
            TransferEngineSpec("mooncake", "ascend", memory="device", package=package),
        )


def _causes(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    return f"{error!r}" + (f", caused by {_causes(cause)}" if cause else "")
