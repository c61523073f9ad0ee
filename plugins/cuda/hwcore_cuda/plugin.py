"""The hooks of NVIDIA GPUs. Nothing imports torch before ``setup``."""

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
from hwcore_cuda import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hwcore.host_memory import Registration
    from hwcore.types import CompileRequest

__all__ = ["CudaPlugin"]

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


class CudaPlugin(DeviceModuleHooks, NativeGraphHooks):
    """NVIDIA GPUs through a torch that was built for CUDA.

    Parameters
    ----------
    device_type : str
        Another one, for tests without a GPU: whatever needs no CUDA then runs on it.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__(device_type, "hwcore-cuda")

    @hwcore.hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="cuda",
            device_type=self._device_type,
            vendor="NVIDIA",
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
        from hwcore_cuda.torch_build import INSTALL

        if self._device_type == "cuda" and torch.version.cuda is None:
            message = (
                f"hwcore-cuda: setup got torch {torch.__version__}, whose torch.version.cuda is "
                f"None; expected a torch that was built for CUDA. {INSTALL}."
            )
            raise CapabilityError(message)
        self.start(
            "Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES: the GPU has fallen off the bus, or "
            "the variable was changed since"
        )
        from hwcore_cuda.graphs import captures

        self._captures = captures(self._module)

    @hwcore.hookimpl
    def compile_policy(self, request: CompileRequest) -> CompilePolicy:
        return inductor_policy()

    @hwcore.hookimpl
    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        return triton_kernels("cuda")

    # --- Host memory ---

    @hwcore.hookimpl
    def register_host_memory(self, buffer: memoryview) -> Registration:
        from hwcore.host_memory import Registration

        return Registration(buffer, self._lock, self._unlock)

    def _lock(self, address: int, size_bytes: int) -> None:
        import torch

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
        return "nccl"

    @hwcore.hookimpl
    def transfer_engines(self) -> Sequence[TransferEngineSpec]:
        import torch

        # In host memory alone: that a device's memory can be read from the network depends on the
        # adapter, its driver and the GPU, and was tried on none.
        old = (torch.version.cuda or "").startswith("12.")
        package = "mooncake-transfer-engine" + ("" if old else "-cuda13")
        return (
            TransferEngineSpec(name="shm", protocol="memfd"),
            TransferEngineSpec(name="mooncake", protocol="tcp", package=package),
        )
