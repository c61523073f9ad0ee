"""The router of disaggregated diffusion, its clients, and the way of its workers to it.

================  ===========================================================================
module            what it holds
================  ===========================================================================
`server`          ``Router``: the mind on sockets; `doors` is the sockets, `stats`, `metrics`
`client`          ``RouterClient``; `pending` is a request that it waits for
`link`            ``WorkerLink``: a worker's mind on a socket; `todo` is what it has to do
`core`            the router's mind, without sockets and clocks: what clients say
`registry`        … what workers say; `workers` is what is known of them
`jobs`            … requests on workers; `requests`, `queues` and `returns` are where they are
`worker_core`     the worker's mind, likewise; `grants` is the slots that it offers
`security`        who may connect; `sockets` and `connection`: neither blocks nor grows
================  ===========================================================================

``Router``, ``RouterClient`` and ``WorkerLink`` need the extra ``hwcore[diffusion]``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hwcore.diffusion.router.config import RouterConfig
from hwcore.diffusion.router.core import RouterCore
from hwcore.diffusion.router.worker_core import WorkerCore

if TYPE_CHECKING:
    from hwcore.diffusion.router.client import RouterClient
    from hwcore.diffusion.router.link import WorkerLink
    from hwcore.diffusion.router.pending import Pending
    from hwcore.diffusion.router.server import Router

__all__ = [
    "Pending",
    "Router",
    "RouterClient",
    "RouterConfig",
    "RouterCore",
    "WorkerCore",
    "WorkerLink",
]

_HOMES = {"Pending": "pending", "Router": "server", "RouterClient": "client", "WorkerLink": "link"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
