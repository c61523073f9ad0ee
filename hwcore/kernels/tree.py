"""A draft tree's mask, positions and links, from its parent pointers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.kernels.thresholds import reads_are_free
from hwcore.kernels.torch_ops import TORCH

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps

__all__ = ["build_tree"]

FULL, QLEN_ONLY, BITPACKED = range(3)
_WORD_BITS = 64


def build_tree(
    parents: Tensor,
    seq_lens: Tensor,
    spec_steps: int,
    mask_mode: int,
    seq_lens_sum: int,
    *,
    ops: TorchOps = TORCH,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Build what attention and verify want of a batch of trees.

    Parameters
    ----------
    parents : Tensor, int64, [bs, N], device
        Index of each node's parent, before it; -1 for the root, node 0, and for padding.
    seq_lens : Tensor, int64 or int32, [bs], device
        Tokens before the root; may pass 2^31.
    spec_steps : int
        Bound on the depth of any node.
    mask_mode : int
        0 FULL, 1 QLEN_ONLY, 2 BITPACKED, as ``TreeMaskMode`` describes them.
    seq_lens_sum : int
        Sum of ``seq_lens``; looked at for FULL alone.

    Returns
    -------
    positions : Tensor, int64, [bs, N]
    tree_mask : Tensor
    next_token, next_sibling : Tensor, int64, [bs, N]
        First child and next child of the same parent; -1 = none.

    Notes
    -----
    Source: SGLang's ``build_tree_kernel_efficient``. Host sync: no. Graph-safe: yes, FULL
    excepted: its size follows the lengths.
    """
    lens = seq_lens.to(torch.int64)
    depth, words = _ancestry(parents, spec_steps, ops)
    if mask_mode == BITPACKED:
        mask = _packed(words, parents.shape[1])
    else:
        mask = _unpacked(words, parents.shape[1], ops)
        if mask_mode == FULL:
            mask = _full(mask, lens, seq_lens_sum, ops)
    return (lens.unsqueeze(1) + depth, mask, *_links(parents, ops))


def _ancestry(parents: Tensor, spec_steps: int, ops: TorchOps) -> tuple[Tensor, Tensor]:
    """Return each node's depth ``[bs, N]``, and as bits what it sees ``[bs, N, words]``, int64.

    Pointer doubling: after ``k`` rounds a node knows its ``2^k`` nearest ancestors, so the rounds
    grow with the logarithm of the depth. A depth beyond the bound still comes out as larger.
    """
    bs, n = parents.shape
    node = torch.arange(n, device=parents.device)
    num_words = -(-n // _WORD_BITS)
    word = torch.arange(num_words, device=parents.device)
    own = (node // _WORD_BITS).unsqueeze(1) == word  # [N, words]
    sees = torch.where(own, (torch.ones_like(node) << (node % _WORD_BITS)).unsqueeze(1), 0)
    sees = sees.repeat(bs, 1, 1)
    # Whoever has no parent points to itself: looking again at one's own row changes nothing.
    jump = torch.where(parents < 0, node, parents)
    depth = (parents >= 0).to(torch.int64)
    for _ in range(spec_steps.bit_length()):
        sees = sees | ops.gather(sees, 1, jump.unsqueeze(2).expand(-1, -1, num_words))
        depth = depth + ops.gather(depth, 1, jump)
        jump = ops.gather(jump, 1, jump)
    return depth, sees


def _links(parents: Tensor, ops: TorchOps) -> tuple[Tensor, Tensor]:
    """Return the first child and the next sibling of every node, both ``[bs, N]``."""
    bs, n = parents.shape
    node = torch.arange(n, device=parents.device)
    # Distinct keys: one sort puts siblings side by side, in index order, whatever its algorithm.
    keys = torch.where(parents < 0, n, parents) * n + node
    keys = ops.sort(keys, dim=1).values
    node, parent = keys % n, keys // n  # parent n: the parentless, at the end
    opens = torch.ones_like(parent, dtype=torch.bool)
    opens[:, 1:] = parent[:, 1:] != parent[:, :-1]
    # Column n takes what nobody reads.
    next_token = parents.new_full((bs, n + 1), -1)
    ops.scatter_(next_token, 1, torch.where(opens, parent, n), node)
    follows = ~opens[:, 1:] & (parent[:, 1:] < n)
    next_sibling = torch.full_like(parents, -1)
    ops.scatter_(next_sibling, 1, node[:, :-1], torch.where(follows, node[:, 1:], -1))
    return next_token[:, :n].contiguous(), next_sibling


def _unpacked(words: Tensor, n: int, ops: TorchOps) -> Tensor:
    """Return bits as bools ``[bs, N, N]``."""
    bit = 2 ** torch.arange(8, dtype=torch.uint8, device=words.device)
    byte = torch.arange(256, device=words.device).to(torch.uint8).unsqueeze(1)
    # The eight bools of every byte, in one int64: a look-up moves eight at a time.
    table = (byte.bitwise_and(bit) != 0).view(torch.int64).view(-1)  # [256]
    sees = words.view(torch.uint8)  # [bs, N, bytes], lowest bit first on every host there is
    octets = ops.index_select(table, 0, sees.to(torch.int32).view(-1))
    bits: Tensor = octets.view(sees.shape).view(torch.bool)
    return bits[:, :, :n].contiguous()


def _packed(words: Tensor, n: int) -> Tensor:
    """Return bits in as many bytes as the layout has, lowest bit first."""
    num_bytes = (1 if n <= 8 else 2) if n <= 16 else -(-n // 32) * 4
    return words.view(torch.uint8)[:, :, :num_bytes].contiguous()


def _full(visible: Tensor, lens: Tensor, seq_lens_sum: int, ops: TorchOps) -> Tensor:
    """Return the flat mask: all visible, then each request's ``N x N`` block laid over it."""
    bs, n, _ = visible.shape
    mask = torch.ones(n * (seq_lens_sum + bs * n), dtype=torch.bool, device=visible.device)
    if reads_are_free(lens):
        # Strided copies: a quarter of the time that an index of every bit takes.
        begin = 0
        for block, length in zip(visible, lens.tolist(), strict=True):
            end = begin + n * (length + n)
            mask[begin:end].view(n, -1)[:, length:] = block
            begin = end
        return mask
    node = torch.arange(n, device=visible.device)
    width = lens + n  # [bs]; int64, as N * sum(width) passes 2^31 at ordinary long contexts
    start = n * (ops.cumsum(width, 0) - width)
    rows = start.view(-1, 1) + node * width.view(-1, 1) + lens.view(-1, 1)  # [bs, N]
    index = rows.unsqueeze(2) + node
    ops.scatter_(mask, 0, index.view(-1), visible.reshape(-1))
    return mask
