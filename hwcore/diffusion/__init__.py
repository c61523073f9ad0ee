"""Disaggregated diffusion: tensors from role to role, in memory that is given out in leases.

``DiffusionTransferManager`` moves trees from process to process: containers of tensors and plain
values, never by pickle. ``TransferTensorBuffer`` is the memory that it gives out, ``pack_tensors``
and ``unpack_tensors`` are the way by a socket. Nothing here knows a device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hwcore.diffusion.codec import pack_tensors, unpack_tensors
from hwcore.diffusion.enums import EnumRegistry
from hwcore.diffusion.host import TensorWrapper
from hwcore.diffusion.layout import Layout, TensorEntry, layout_of
from hwcore.diffusion.leases import Lease, PoolStats
from hwcore.diffusion.manifest import Manifest, decode_manifest, encode_manifest, manifest_of
from hwcore.diffusion.pool import Loaded, TransferTensorBuffer, Written
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.sending import Staged
from hwcore.diffusion.transfer import DiffusionTransferManager, TransferStats

if TYPE_CHECKING:
    from hwcore.diffusion.router.server import Router as Router

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


def __getattr__(name: str) -> Any:
    if name != "Router":  # which needs more than this package does
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return importlib.import_module("hwcore.diffusion.router").Router
