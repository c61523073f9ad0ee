"""Disaggregated diffusion: tensors from role to role, in memory that is given out in leases.

``TransferTensorBuffer`` is the memory, ``DiffusionTransferManager`` brings trees of tensors from
the memory of one process into another's, ``pack_tensors`` and ``unpack_tensors`` are the way by a
socket. Trees are containers of tensors and plain values; nothing is ever pickled, and nothing here
knows a device. From the bottom up:

==================  =========================================================================
modules             what they hold
==================  =========================================================================
`tree`, `enums`     nested containers as a structure and a flat list of tensors
`specs`, `layout`,  what a tensor is, where each lies in a range of bytes, and both with the
`manifest`          structure: what is said of a tree
`views`, `host`,    bytes seen as tensors, tensors as bytes; how they are copied and summed
`gathering`,
`writing`,
`copying`,
`checksum`
`codec`             a tree as the frames of a message
`allocator`,        ranges of a pool, who has them, who waits for them; the pool
`leases`, `table`,
`waiting`,
`lending`, `pool`
`engines/`          bytes from one process's pool into another's
`peers`, `running`, the manager's parts: connections, calls that are at work, ways to a slot,
`ways`, `seal`,     what a receiver must know, both sides; and the manager
`sending`,
`receiving`,
`stats`,
`transfer`
`roles`,            who does what for a request, and what clients, router and workers say
`messages`
`router/`           requests through workers, over sockets
`serving/`          what makes a role of a scheduler
`launch/`           what starts roles and router, and starts them again
==================  =========================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hwcore.diffusion.codec import pack_tensors, unpack_tensors
from hwcore.diffusion.enums import EnumRegistry
from hwcore.diffusion.host import TensorWrapper
from hwcore.diffusion.layout import Layout, TensorEntry, layout_of
from hwcore.diffusion.leases import Lease
from hwcore.diffusion.manifest import Manifest, decode_manifest, encode_manifest, manifest_of
from hwcore.diffusion.pool import Loaded, TransferTensorBuffer, Written
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.sending import Staged
from hwcore.diffusion.stats import TransferStats
from hwcore.diffusion.table import PoolStats
from hwcore.diffusion.transfer import DiffusionTransferManager

if TYPE_CHECKING:
    from hwcore.diffusion.router.client import RouterClient as RouterClient
    from hwcore.diffusion.router.server import Router as Router
    from hwcore.diffusion.serving.request import DiffusionRequest as DiffusionRequest
    from hwcore.diffusion.serving.scheduler import SchedulerDisaggMixin as SchedulerDisaggMixin

__all__ = [
    "DiffusionTransferManager",
    "EnumRegistry",
    "Layout",
    "Lease",
    "Loaded",
    "Manifest",
    "PoolStats",
    "RoleType",
    "Staged",
    "TensorEntry",
    "TensorWrapper",
    "TransferStats",
    "TransferTensorBuffer",
    "Written",
    "decode_manifest",
    "encode_manifest",
    "layout_of",
    "manifest_of",
    "pack_tensors",
    "unpack_tensors",
]


# What needs more than this package does: hwcore[diffusion].
_LATER = {
    "DiffusionRequest": "hwcore.diffusion.serving.request",
    "Router": "hwcore.diffusion.router",
    "RouterClient": "hwcore.diffusion.router",
    "SchedulerDisaggMixin": "hwcore.diffusion.serving.scheduler",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(_LATER[name]), name)
