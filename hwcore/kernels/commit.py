"""The accepted path, brought to the front."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.kernels.torch_ops import TORCH

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps

__all__ = ["commit_paths"]


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
