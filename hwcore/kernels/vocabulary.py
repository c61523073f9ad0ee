"""Reductions over the vocabulary in blocks, and back into the block that matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps

__all__ = ["BLOCK", "block_of", "blocked", "lowest_argmax"]

BLOCK = 256
"""Tokens a block: the two levels are about as long for vocabularies of 30 000 to 300 000."""


def blocked(reduce: Callable[..., Any], rows: Tensor) -> Tensor:
    """Reduce each block of ``rows [k, V]``; return ``[k, blocks]``, the last block shorter."""
    vocab = rows.shape[1]
    whole = vocab // BLOCK * BLOCK
    parts = []
    if whole:
        parts.append(reduce(torch.unflatten(rows[:, :whole], 1, (-1, BLOCK)), -1))
    if whole < vocab:
        parts.append(reduce(rows[:, whole:], -1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def block_of(rows: Tensor, block: Tensor, beyond: float, ops: TorchOps) -> Tensor:
    """Return one block of each row, ``[k, BLOCK]``, with ``beyond`` past the vocabulary's end.

    ``block`` is int64 ``[k, 1]``, and one that there is.
    """
    vocab = rows.shape[1]
    token = block * BLOCK + torch.arange(min(BLOCK, vocab), device=rows.device)
    if vocab % BLOCK:
        values = ops.gather(rows, 1, token.clamp(max=vocab - 1))
        return torch.where(token < vocab, values, beyond)
    found: Tensor = ops.gather(rows, 1, token)
    return found


def lowest_argmax(rows: Tensor, ops: TorchOps) -> Tensor:
    """Return the token of the highest logit, of equal ones the lowest, int64 ``[k]``.

    -1 where a row holds NaN or +inf, or nothing but -inf.

    Reading the row's blocks for their maxima and then one block takes as long as reading the row;
    torch's argmax takes several times that on a CPU, and promises nothing of equal logits.
    """
    highest = blocked(ops.amax, rows)  # [k, blocks]
    top = ops.amax(highest, -1, keepdim=True)
    # NaN is equal to nothing: then it is none of the blocks.
    block = _first(highest == top, ops).clamp(max=highest.shape[1] - 1)
    token = block * BLOCK + _first(block_of(rows, block, float("-inf"), ops) == top, ops)
    return torch.where(torch.isfinite(top), token, -1).squeeze(1)


def _first(marks: Tensor, ops: TorchOps) -> Tensor:
    """Return the first marked place of each row, ``[k, 1]``; its length where there is none."""
    place = torch.arange(marks.shape[1], device=marks.device)
    found: Tensor = ops.amin(torch.where(marks, place, marks.shape[1]), 1, keepdim=True)
    return found
