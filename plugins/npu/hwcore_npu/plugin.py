"""The hooks of the NPU. What it shares with other devices is left to the contract's defaults."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import hwcore
from hwcore import torch_build
from hwcore.device_module import DeviceModuleHooks, NativeGraphHooks
from hwcore.errors import CapabilityError, describe
from hwcore.types import (
    Availability,
    BackendInfo,
    CompilePolicy,
    HostMemoryPolicy,
    PlanStreamPolicy,
    TransferEngineSpec,
)
from hwcore_npu import probe
from hwcore_npu.torch_build import problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from hwcore.types import Capability, CompileRequest, ReplayBatch
    from hwcore_npu.graphs import NpuCaptures, NpuGraph

__all__ = ["NpuPlugin"]

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


class NpuPlugin(DeviceModuleHooks, NativeGraphHooks):
    """Huawei Ascend NPUs, through torch_npu."""

    _captures: NpuCaptures

    def __init__(self) -> None:
        super().__init__("npu", "hwcore-npu")

    @hwcore.hookimpl
    def backend_info(self) -> BackendInfo:
        capabilities: list[Capability] = ["async_streams", "event_timing", "graphs"]
        capabilities += ["interprocess_events", "pinned_memory", "device_direct_transfer"]
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

        where = "hwcore-npu: setup"
        if wrong := problem(torch_build.installed()):
            message = f"{where}: {wrong.reason}. {wrong.fix}."
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
        self.start("See whether `npu-smi info` still lists the device")
        from hwcore_npu.graphs import NpuCaptures

        self._captures = NpuCaptures(self._module)

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
    def create_graph(self) -> NpuGraph:
        from hwcore_npu.graphs import NpuGraph

        return NpuGraph(self._captures, self._module)

    @hwcore.hookimpl
    def graph_replay(
        self,
        graph: NpuGraph,
        buffers: Mapping[str, torch.Tensor] | None = None,
        batch: ReplayBatch | None = None,
    ) -> None:
        graph.replay(buffers, batch)

    # --- Other processes ---

    @hwcore.hookimpl
    def distributed_backend(self) -> str:
        return "hccl"

    @hwcore.hookimpl
    def transfer_engines(self) -> Sequence[TransferEngineSpec]:
        package = "mooncake-transfer-engine-npu"
        return (
            TransferEngineSpec(name="shm", protocol="memfd"),
            # As Mooncake documents its Ascend transports: between devices, and host and device.
            TransferEngineSpec("mooncake", "ascend", memory="device", package=package),
        )


def _causes(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    return f"{error!r}" + (f", caused by {_causes(cause)}" if cause else "")
