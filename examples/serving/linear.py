"""The product that decoding spends its time on."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x [..., in]`` times the transpose of ``weight [out, in]``, as ``functional.linear``.

    Decoding multiplies a handful of rows by large weights. A CPU's library is two to four times
    faster with the weight as the left factor, and slowest of all with a single row, which goes in
    twice for that.
    """
    rows = x.reshape(-1, x.shape[-1])
    columns = (rows.repeat(2, 1) if len(rows) == 1 else rows).t()
    product = torch.mm(weight, columns)[:, : len(rows)].t().contiguous()
    return product.view(*x.shape[:-1], -1)
