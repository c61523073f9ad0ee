"""The simulated device: a PyTorch device in C++ whose streams run work only when waited for.

What a vendor has in hardware, driver and torch extension. Importing this package imports torch,
but neither builds nor registers anything: :func:`start` does, and the plugin's ``setup`` calls it.
The rest is what a real device lacks: control over when queued work runs, which operators exist,
and a look at memory that disturbs nothing.

Environment: ``HWCORE_SIM_NAME`` (the device type, default ``sim``), ``HWCORE_SIM_DEVICES`` (how
many, default 2), ``HWCORE_SIM_MEMORY`` (bytes of each, default ``4G``), ``HWCORE_SIM_DRAIN`` (the
drain policy, default ``lazy``), ``HWCORE_SIM_CAPTURE_STREAMS`` (default 2048) and
``HWCORE_SIM_CACHE`` (where the built device is kept). All but the last are read by ``start``.
"""

from hwcore_sim.device.control import (
    drain_policy,
    get_drain_policy,
    get_pinned_reuse,
    host_waits,
    launch_host_function,
    memory_stats,
    peek,
    pending,
    pinned_reuse,
    reset,
    set_drain_policy,
    set_memory_capacity,
    set_pinned_reuse,
)
from hwcore_sim.device.denial import allow, denied, denied_ops, deny, is_denied
from hwcore_sim.device.graphs import (
    Graph,
    GraphPool,
    capture_stream_limit,
    graph_pool,
    is_capturing,
    set_capture_stream_limit,
    streams_left,
)
from hwcore_sim.device.registration import is_initialized, start

__all__ = [
    "Graph",
    "GraphPool",
    "allow",
    "capture_stream_limit",
    "denied",
    "denied_ops",
    "deny",
    "drain_policy",
    "get_drain_policy",
    "get_pinned_reuse",
    "graph_pool",
    "host_waits",
    "is_capturing",
    "is_denied",
    "is_initialized",
    "launch_host_function",
    "memory_stats",
    "peek",
    "pending",
    "pinned_reuse",
    "reset",
    "set_capture_stream_limit",
    "set_drain_policy",
    "set_memory_capacity",
    "set_pinned_reuse",
    "start",
    "streams_left",
]
