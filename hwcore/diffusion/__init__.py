"""Disaggregated diffusion: tensors from role to role, in memory that is given out in leases.

``TransferTensorBuffer`` is the memory, ``pack_tensors`` and ``unpack_tensors`` are the way by a
socket. Both move trees: containers of tensors and plain values, never by pickle. Nothing here
knows a device.
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

if TYPE_CHECKING:
    from hwcore.diffusion.router.server import Router as Router

__all__ = [
    "EnumRegistry",
    "Layout",
    "Lease",
    "Loaded",
    "Manifest",
    "PoolStats",
    "RoleType",
    "TensorEntry",
    "TensorWrapper",
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
