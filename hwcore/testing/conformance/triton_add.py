"""A sum by Triton, to see whether a device runs its kernels. Importing this needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add"]

_BLOCK = 64


# No annotation but tl.constexpr: Triton's compiler would look the names up, and refuse them.
@triton.jit
def _add(a, b, out, count, block: tl.constexpr):  # noqa: ANN001, ANN202
    offset = tl.program_id(0) * block + tl.arange(0, block)
    inside = offset < count
    total = tl.load(a + offset, mask=inside) + tl.load(b + offset, mask=inside)
    tl.store(out + offset, total, mask=inside)


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``a + b``, of one dimension, computed by a Triton kernel."""
    out = torch.empty_like(a)
    _add[(triton.cdiv(a.numel(), _BLOCK),)](a, b, out, a.numel(), _BLOCK)
    return out
