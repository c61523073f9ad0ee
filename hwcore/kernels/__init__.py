"""Portable references of the operations that a device may bring a kernel for.

A plugin's ``kernels()`` replaces any of them by name; what it leaves out runs as written here, on
whatever device the arguments live on. ``kernel`` chooses. Torch's own operations that a device may
lack are reached through ``torch_ops``, in an ``explains_missing`` block.
"""

from hwcore.kernels.relay import assert_and_invalidate, gather_rows
from hwcore.kernels.selection import kernel, references
from hwcore.kernels.torch_ops import TorchOps, explain_missing, explains_missing, torch_ops

__all__ = [
    "TorchOps",
    "assert_and_invalidate",
    "explain_missing",
    "explains_missing",
    "gather_rows",
    "kernel",
    "references",
    "torch_ops",
]
