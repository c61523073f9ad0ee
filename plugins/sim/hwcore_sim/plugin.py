"""The hooks of the simulated accelerator, and the model of a plugin.

What a device shares with others is left to the contract's defaults, which call torch's generic
API; only what differs stands here. Nothing imports torch before ``setup``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import hwcore
from hwcore.types import Availability, BackendInfo, CompilePolicy, HostMemoryPolicy
from hwcore_sim import probe

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hwcore.types import Capability, CompileRequest, Stream

__all__ = ["SimPlugin"]


def _several_devices() -> frozenset[Capability]:
    # setup() says what is wrong with a value that is no count.
    one = os.environ.get("HWCORE_SIM_DEVICES", "").lstrip("0") == "1"
    return frozenset() if one else frozenset({"multi_device"})


class SimPlugin:
    """The simulated accelerator, chosen by name only (``automatic=False``)."""

    @hwcore.hookimpl
    def backend_info(self) -> BackendInfo:
        return BackendInfo(
            name="sim",
            device_type=os.environ.get("HWCORE_SIM_NAME") or "sim",
            vendor="hwcore",
            api_version="1.0",
            priority=1,
            automatic=False,
            capabilities=frozenset(
                {
                    "async_streams",
                    "stream_priorities",
                    "event_timing",
                    "blocking_events",
                    "graphs",
                    "pinned_memory",
                    "float64",
                    "float8",
                    *_several_devices(),
                }
            ),
            quirks=frozenset({"capture_stream_limit"}),
        )

    @hwcore.hookimpl
    def probe(self) -> Availability:
        return probe.availability()

    @hwcore.hookimpl
    def setup(self) -> None:
        from hwcore_sim import device

        device.start()
        self._device = device

    @hwcore.hookimpl
    def compile_policy(self, request: CompileRequest) -> CompilePolicy:
        reason = "torch's compilers generate no code for a simulated device"
        return CompilePolicy(enabled=False, reason=reason)

    @hwcore.hookimpl
    def needs_cpu_fallback(self, tensor: torch.Tensor, purpose: str) -> bool:
        if tensor.device.type == "cpu":
            return False
        # What works in place is asked for by the same name; torch makes `softmax` of `_softmax`.
        forms = (purpose, f"{purpose}_", f"_{purpose}")
        return purpose in ("serialize", "numpy") or any(map(self._device.is_denied, forms))

    @hwcore.hookimpl
    def host_memory_policy(self) -> HostMemoryPolicy:
        return HostMemoryPolicy(
            can_pin=True,
            reuse_waits_for_copy=self._device.get_pinned_reuse() == "safe",
            copies_ordered_with_kernels=True,
        )

    @hwcore.hookimpl
    def create_graph(self) -> Any:
        return self._device.Graph()

    @hwcore.hookimpl
    def graph_pool(self) -> Any:
        return self._device.graph_pool()

    @hwcore.hookimpl
    def graph_capture(
        self, graph: Any, fn: Callable[[], Any], pool: Any = None, stream: Stream | None = None
    ) -> Any:
        return graph.capture(fn, pool=pool, stream=stream)

    @hwcore.hookimpl
    def is_capturing(self) -> bool:
        return self._device.is_capturing()

    @hwcore.hookimpl
    def distributed_backend(self) -> str:
        return "gloo"  # the core stages device tensors through the host
