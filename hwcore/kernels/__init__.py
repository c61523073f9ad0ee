"""Portable references of the operations that a device may bring a kernel for.

A plugin's ``kernels()`` replaces any of them by name; what it leaves out runs as written here, on
whatever device the arguments live on. ``kernel`` chooses. Torch's own operations that a device may
lack are reached through ``torch_ops``, in an ``explains_missing`` block.
"""

from hwcore.kernels.commit import commit_paths, move_kv
from hwcore.kernels.mrope import mrope_positions
from hwcore.kernels.relay import assert_and_invalidate, gather_rows
from hwcore.kernels.selection import kernel, references
from hwcore.kernels.torch_ops import TorchOps, explain_missing, explains_missing, torch_ops
from hwcore.kernels.tree import build_tree
from hwcore.kernels.verify import verify_tree_greedy, verify_tree_sampling

__all__ = [
    "TorchOps",
    "assert_and_invalidate",
    "build_tree",
    "commit_paths",
    "explain_missing",
    "explains_missing",
    "gather_rows",
    "kernel",
    "move_kv",
    "mrope_positions",
    "references",
    "torch_ops",
    "verify_tree_greedy",
    "verify_tree_sampling",
]
