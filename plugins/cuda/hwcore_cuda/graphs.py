"""CUDA's own graphs, for :class:`hwcore.graphs.native.Graph`."""

from __future__ import annotations

from typing import Any

import torch

from hwcore.graphs.native_captures import ModuleCaptures

__all__ = ["captures"]


def captures(module: Any) -> ModuleCaptures:
    """Return how torch captures with ``module``: ``torch.cuda``."""
    return ModuleCaptures(module, lambda: module.CUDAGraph(), _release)


def _release(device: int, pool: Any) -> None:
    torch._C._cuda_endAllocateToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)
