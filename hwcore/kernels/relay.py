"""The operations of FutureMap that a device may do faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.kernels.torch_ops import TORCH

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps

__all__ = ["assert_and_invalidate", "gather_rows"]


def gather_rows(rows: Tensor, indices: Tensor, out: Tensor, *, ops: TorchOps = TORCH) -> Tensor:
    """Copy rows of one tensor into another.

    Parameters
    ----------
    rows : Tensor, int64, [pool, words], device
    indices : Tensor, int64 or int32, [bs], device
        In [0, pool); rows may repeat.
    out : Tensor, int64, [bs, words], device
        Overwritten.
    ops : TorchOps
        No part of a kernel's contract: what the reference calls torch through.

    Returns
    -------
    Tensor
        ``out``.

    Notes
    -----
    Source: SGLang's relay gather, which copies four buffers by as many kernels or by a fused one.
    Here what belongs to a request lies in one row, so that one gather is all there is. Host sync:
    no. Graph-safe: yes.
    """
    gathered: Tensor = ops.index_select(rows, 0, indices, out=out)
    return gathered


def assert_and_invalidate(
    guards: Tensor, state: Tensor, indices: Tensor, outcome: Tensor, *, ops: TorchOps = TORCH
) -> tuple[Tensor, Tensor]:
    """Note whether any row that was read had been empty, and empty the rows.

    Parameters
    ----------
    guards : Tensor, int64, [bs], device
        The guard word of each row as it was read: negative if the row was empty.
    state : Tensor, int32, [pool, n], device
        What -1 empties.
    indices : Tensor, int64 or int32, [bs], device
        The rows that were read.
    outcome : Tensor, int64, [], device
        Receives the least guard word; 0 for an empty batch.
    ops : TorchOps
        No part of a kernel's contract: what the reference calls torch through.

    Returns
    -------
    outcome, state : Tensor

    Notes
    -----
    Source: SGLang's ``_assert_nonneg_and_invalidate``. It asserts on the device, which loses the
    message and ends the process's device context; here the caller learns the row, and when it
    asks. Host sync: no. Graph-safe: yes.
    """
    if guards.numel() == 0:
        return outcome.zero_(), state
    rows = indices.to(torch.int64)  # index_fill_ takes no other
    return ops.amin(guards, 0, out=outcome), ops.index_fill_(state, 0, rows, -1)
