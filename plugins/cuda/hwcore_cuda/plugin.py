"""The hooks of NVIDIA GPUs. Nothing imports torch before ``setup``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hwcore
from hwcore.device_module import DeviceModuleHooks, triton_kernels
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

    from hwcore.graphs.native import Graph
    from hwcore.host_memory import Registration
    from hwcore.types import CompileRequest, Stream

__all__ = ["CudaPlugin"]


class CudaPlugin(DeviceModuleHooks):
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
        from hwcore_cuda.graphs import CudaCaptures
        from hwcore_cuda.host_memory import HostMemory

        self._captures = CudaCaptures(self._module)
        self._host_memory = HostMemory(self._module)

    @hwcore.hookimpl
    def compile_policy(self, request: CompileRequest) -> CompilePolicy:
        from importlib.util import find_spec

        if find_spec("triton") is None:
            reason = "inductor needs Triton, which is not installed: `pip install triton`"
            return CompilePolicy(enabled=False, reason=reason)
        return CompilePolicy(enabled=True, reason="inductor has a code generator for it")

    @hwcore.hookimpl
    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        return triton_kernels("cuda")

    # --- Host memory ---

    @hwcore.hookimpl
    def register_host_memory(self, buffer: memoryview) -> Registration:
        return self._host_memory.register(buffer)

    @hwcore.hookimpl
    def host_memory_policy(self) -> HostMemoryPolicy:
        # torch's pinned allocator records an event behind each copy from a block, and a copy is
        # work of its stream like any other.
        return HostMemoryPolicy(
            can_pin=True, reuse_waits_for_copy=True, copies_ordered_with_kernels=True
        )

    # --- Graphs ---

    @hwcore.hookimpl
    def create_graph(self) -> Graph:
        from hwcore.graphs.native import Graph

        return Graph(self._captures)

    @hwcore.hookimpl
    def graph_pool(self) -> Any:
        return self._captures.pool()

    @hwcore.hookimpl
    def graph_capture(
        self, graph: Graph, fn: Callable[[], Any], pool: Any = None, stream: Stream | None = None
    ) -> Any:
        return graph.capture(fn, pool, stream)

    @hwcore.hookimpl
    def is_capturing(self) -> bool:
        return bool(self._module.is_current_stream_capturing())

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
