"""The router of disaggregated diffusion, and what its workers keep to.

``core`` and ``worker_core`` are the two ends of the protocol, without sockets and clocks;
``requests`` and ``workers`` is what the first one knows.
"""

from hwcore.diffusion.router.config import RouterConfig
from hwcore.diffusion.router.core import RouterCore
from hwcore.diffusion.router.worker_core import WorkerCore

__all__ = ["RouterConfig", "RouterCore", "WorkerCore"]
