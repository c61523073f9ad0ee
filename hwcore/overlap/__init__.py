"""Overlap scheduling: step n+1 is prepared while step n runs, and no value passes through the host.

``FutureMap`` hands values from one step to the next by rows of the request pool. ``PlanStream``
prepares a step on a side stream. ``StreamFence``, which ``FutureMap`` stands on, orders whoever
shares memory across streams. Nothing here knows a device: streams are ordered by the backend's
hooks.
"""

from hwcore.fence import StreamFence
from hwcore.overlap.future_map import FutureMap
from hwcore.overlap.plan_stream import PlanStream, Prepared, recomputes
from hwcore.overlap.relay import RelayPayload, RelaySpec

__all__ = [
    "FutureMap",
    "PlanStream",
    "Prepared",
    "RelayPayload",
    "RelaySpec",
    "StreamFence",
    "recomputes",
]
