"""The accepted path, brought to the front: what it is, and its KV entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.kernels.torch_ops import TORCH

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps

__all__ = ["commit_paths", "move_kv"]


def commit_paths(
    predict: Tensor,
    accept_index: Tensor,
    accept_lens: Tensor,
    seq_lens: Tensor,
    cache_locs: Tensor | None,
    page_size: int,
    *,
    ops: TorchOps = TORCH,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Turn accepted paths into tokens, lengths and KV moves.

    Parameters
    ----------
    predict : Tensor, int32, [bs * N], device
        The target's token after each node of a path.
    accept_index : Tensor, int32, [bs, W], device
        The paths, as indices into ``predict``; -1 past their ends.
    accept_lens : Tensor, int32, [bs], device
    seq_lens : Tensor, int64 or int32, [bs], device
        Tokens in the KV cache before the root.
    cache_locs : Tensor, int64, [bs, N], device, or None
        KV slot of each node.
    page_size : int
        Slots that are freed together.

    Returns
    -------
    accept_tokens : Tensor, int64, [bs, W]
        -1 past the end.
    new_seq_lens : Tensor, dtype of ``seq_lens``, [bs]
    keep_lens : Tensor, int64, [bs]
        How many of ``cache_locs`` a request keeps: to the end of the page of its last entry, at
        most N.
    kv_src, kv_dst : Tensor, int64, [bs, W], or None
        Moves to the front; past the end the root's slot onto itself.

    Notes
    -----
    Source: SGLang's compaction after verify. Host sync: no. Graph-safe: yes.
    """
    bs = accept_index.shape[0]
    nodes = predict.shape[0] // bs if bs else 0
    accepted = accept_index >= 0  # [bs, W]
    flat = accept_index.to(torch.int64).clamp(min=0)
    tokens = ops.gather(predict, 0, flat.view(-1)).view_as(flat).to(torch.int64)
    new_lens = seq_lens + accept_lens.to(seq_lens.dtype)
    ends = new_lens.to(torch.int64)
    pages_end = (ends + page_size - 1).div(page_size, rounding_mode="floor") * page_size
    keep_lens = (pages_end - seq_lens).clamp(max=nodes)
    kv_src = kv_dst = None
    if cache_locs is not None:
        step = torch.arange(flat.shape[1], device=flat.device)
        first_row = (torch.arange(bs, device=flat.device) * nodes).unsqueeze(1)
        # Node 0, the root, stands in where the path has ended: it always moves onto itself.
        kv_src = ops.gather(cache_locs, 1, torch.where(accepted, flat - first_row, 0))
        kv_dst = ops.gather(cache_locs, 1, torch.where(accepted, step, 0))
    return torch.where(accepted, tokens, -1), new_lens, keep_lens, kv_src, kv_dst


def move_kv(kv: Tensor, src: Tensor, dst: Tensor, *, ops: TorchOps = TORCH) -> Tensor:
    """Copy KV entries of each request from slots to slots, in every layer.

    Parameters
    ----------
    kv : Tensor, any dtype, [layers, slots, ...], device
        Written in place.
    src, dst : Tensor, int64 or int32, [bs, W], device
        As ``commit_paths`` gives them. A request's entries are all read before any is written. No
        slot that one request writes is read or written by another, and of those that a request
        writes twice the entries are the same.
    ops : TorchOps
        No part of a kernel's contract: what the reference calls torch through.

    Returns
    -------
    Tensor
        ``kv``.

    Notes
    -----
    Source: SGLang's move_kv_cache. Mutates: ``kv``. Host sync: no. Graph-safe: yes.
    """
    # Bytes are bytes: torch has no such copies for some of the smallest types.
    entries = kv.view(torch.uint8) if kv.dtype.itemsize == 1 else kv
    moved = ops.index_select(entries, 1, src.reshape(-1))
    ops.index_copy_(entries, 1, dst.reshape(-1).to(torch.int64), moved)
    return kv
