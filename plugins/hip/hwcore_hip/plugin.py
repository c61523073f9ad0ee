"""The hooks of AMD GPUs. Nothing imports torch before ``setup``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import hwcore
from hwcore.device_module import (
    DeviceModuleHooks,
    NativeGraphHooks,
    inductor_policy,
    triton_kernels,
)
from hwcore.types import (
    Availability,
    BackendInfo,
    CompilePolicy,
    HostMemoryPolicy,
    TransferEngineSpec,
)
from hwcore_hip import event_wait, probe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hwcore.host_memory import Registration
    from hwcore.types import CompileRequest, Event, Stream
    from hwcore_hip.event_wait import Policy

__all__ = ["HipPlugin"]

_PORTABLE = 1  # hipHostRegisterPortable: page-locked for every device


class HipPlugin(DeviceModuleHooks, NativeGraphHooks):
    """AMD GPUs through a torch that was built for ROCm, whose device type is ``cuda``.

    Parameters
    ----------
    device_type : str
        Another one, for tests without a GPU: whatever needs no HIP then runs on it.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__(device_type, "hwcore-hip")
        self._event_wait: Policy | None = None

    @hwcore.hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="hip",
            device_type=self._device_type,
            vendor="AMD",
            api_version="1.0",
            capabilities=frozenset(
                {
                    "async_streams",
                    "stream_priorities",
                    "event_timing",
                    "blocking_events",
                    "interprocess_events",
                    "graphs",
                    "pinned_memory",
                    "host_registration",
                    "compile",
                    "triton",
                    "float64",
                    "float8",
                    "multi_device",
                }
            ),
        )

    @hwcore.hookimpl
    def probe(self) -> Availability:
        return probe.availability()

    @hwcore.hookimpl
    def setup(self) -> None:
        import torch

        from hwcore.errors import CapabilityError
        from hwcore_hip.torch_build import INSTALL

        if self._device_type == "cuda" and torch.version.hip is None:
            message = (
                f"hwcore-hip: setup got torch {torch.__version__}, whose torch.version.hip is "
                f"None; expected a torch that was built for ROCm. {INSTALL}."
            )
            raise CapabilityError(message)
        self.start(
            "Look at `rocminfo`, ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES: ROCm does not "
            "support the GPU, it was reset, or a variable was changed since"
        )
        from hwcore.graphs.native import in_capture
        from hwcore_hip.graphs import captures

        self._event_wait = event_wait.requested()
        self._captures = captures(self._module)
        self._in_graph_capture = in_capture

    # --- Streams and events ---

    @hwcore.hookimpl
    def wait_event(self, event: Event, stream: Stream | None = None) -> None:
        if self._device_waits(event):
            event.wait(stream)

    @hwcore.hookimpl
    def wait_stream(self, waiter: Stream, producer: Stream) -> None:
        if self._device_waits(producer):
            waiter.wait_stream(producer)

    def _device_waits(self, waited_for: Event | Stream) -> bool:
        if self._event_wait is None:  # not in `setup`: what it asks must not create a context
            properties = self._module.get_device_properties(self._module.current_device())
            self._event_wait = event_wait.for_architecture(getattr(properties, "gcnArchName", ""))
        return event_wait.device_waits(self._event_wait, waited_for, self._in_capture)

    def _in_capture(self) -> bool:
        # The second sees captures that no hook has begun.
        return self._in_graph_capture() or self._captures.is_capturing()

    # --- Compilation and operators ---

    @hwcore.hookimpl
    def compile_policy(self, request: CompileRequest) -> CompilePolicy:
        return inductor_policy()

    @hwcore.hookimpl
    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        return triton_kernels("hip")

    # --- Host memory ---

    @hwcore.hookimpl
    def register_host_memory(self, buffer: memoryview) -> Registration:
        from hwcore.host_memory import Registration

        return Registration(buffer, self._lock, self._unlock)

    def _lock(self, address: int, size_bytes: int) -> None:
        import torch

        # A ROCm build has HIP's functions under the names that CUDA's have.
        code = self._module.cudart().cudaHostRegister(address, size_bytes, _PORTABLE)
        try:
            self._module.check_error(code)
        except RuntimeError:
            with contextlib.suppress(RuntimeError):  # it has the code too, left for the next kernel
                torch.zeros(1, device=self._device_type)
            raise

    def _unlock(self, address: int) -> None:
        self._module.check_error(self._module.cudart().cudaHostUnregister(address))

    @hwcore.hookimpl
    def host_memory_policy(self) -> HostMemoryPolicy:
        # torch's pinned allocator records an event behind each copy from a block, and a copy is
        # work of its stream like any other.
        return HostMemoryPolicy(
            can_pin=True, reuse_waits_for_copy=True, copies_ordered_with_kernels=True
        )

    # --- Other processes ---

    @hwcore.hookimpl
    def distributed_backend(self) -> str:
        return "nccl"  # torch's name for RCCL in a ROCm build

    @hwcore.hookimpl
    def transfer_engines(self) -> Sequence[TransferEngineSpec]:
        # In host memory alone: that a device's memory can be read from the network depends on the
        # adapter, its driver and the GPU, and was tried on none.
        package = "mooncake-transfer-engine-rocm"
        return (
            TransferEngineSpec(name="shm", protocol="memfd"),
            TransferEngineSpec(name="mooncake", protocol="tcp", package=package),
        )
