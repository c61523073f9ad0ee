"""A sum by Triton, to see whether a device runs its kernels. Importing this needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

__all__ = ["add"]

_BLOCK = 64


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add(a: Any, b: Any, out: Any, count: Any, block: tl.constexpr) -> None:
    offset = tl.program_id(0) * block + tl.arange(0, block)
    inside = offset < count
    total = tl.load(a + offset, mask=inside) + tl.load(b + offset, mask=inside)
    tl.store(out + offset, total, mask=inside)


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``a + b``, of one dimension, computed by a Triton kernel."""
    out = torch.empty_like(a)
    _add[(triton.cdiv(a.numel(), _BLOCK),)](a, b, out, a.numel(), _BLOCK)
    return out
