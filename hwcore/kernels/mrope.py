"""Positions on three axes, from those of the text and what each request is ahead of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.kernels.torch_ops import TORCH

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps

__all__ = ["mrope_positions"]


def mrope_positions(
    deltas: Tensor,
    rows: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    *,
    ops: TorchOps = TORCH,
) -> Tensor:
    """Add to each position its request's delta, and repeat it for every axis.

    Parameters
    ----------
    deltas : Tensor, int64, [pool], device
    rows : Tensor, int64 or int32, [bs], device
    positions : Tensor, int64, [tokens], device
    starts : Tensor, int64 or int32, [bs], device, or None
        Number of each request's first token, ascending from 0; None: all have as many.

    Returns
    -------
    Tensor, int64, [3, tokens]

    Notes
    -----
    Source: SGLang's multimodal rotary positions after the prompt, where the axes agree. Host sync:
    no. Graph-safe: yes.
    """
    bs, tokens = rows.shape[0], positions.shape[0]
    if bs == 0:
        return positions.new_zeros(3, tokens)
    ahead = ops.index_select(deltas, 0, rows)  # [bs]
    if starts is None:
        moved = (positions.view(bs, -1) + ahead.unsqueeze(1)).view(-1)
    else:
        token = torch.arange(tokens, device=positions.device, dtype=starts.dtype)
        request = ops.searchsorted(starts, token, right=True) - 1
        moved = positions + ops.index_select(ahead, 0, request)
    out: Tensor = moved.repeat(3, 1)
    return out
