"""A draft tree's mask, positions and links, from its parent pointers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hwcore.kernels.triton import launching

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["build_tree"]

FULL, QLEN_ONLY, BITPACKED = range(3)


def build_tree(
    parents: Tensor, seq_lens: Tensor, spec_steps: int, mask_mode: int, seq_lens_sum: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Build what attention and verify want of a batch of trees, as the reference of this name does.

    Notes
    -----
    One launch, one program a node; a FULL mask is filled by another one before. Mutates: none.
    Host sync: no. Graph-safe: yes, FULL excepted: its size follows the lengths.
    """
    bs, n = parents.shape
    positions = torch.empty(bs, n, dtype=torch.int64, device=parents.device)
    next_token, next_sibling = torch.empty_like(positions), torch.empty_like(positions)
    mask, octets = _mask(parents, mask_mode, seq_lens_sum), 0
    if mask_mode == BITPACKED:
        octets = mask.shape[2]
    launching.launch(
        _build_tree,
        "build_tree",
        (bs * n,),
        parents,
        seq_lens,
        positions,
        mask.view(torch.uint8),
        next_token,
        next_sibling,
        n,
        1 << spec_steps.bit_length(),
        mask.numel(),
        octets,
        *parents.stride(),
        seq_lens.stride(0),
        MODE=mask_mode,
        FULL=FULL,
        BITPACKED=BITPACKED,
        BLOCK=max(8, launching.power_of_two(n)),
    )
    return positions, mask, next_token, next_sibling


def _mask(parents: Tensor, mask_mode: int, seq_lens_sum: int) -> Tensor:
    """Return memory for the mask; of a FULL one the prefix is in it."""
    (bs, n), device = parents.shape, parents.device
    if mask_mode == BITPACKED:
        octets = (1 if n <= 8 else 2) if n <= 16 else triton.cdiv(n, 32) * 4
        return torch.empty(bs, n, octets, dtype=torch.uint8, device=device)
    if mask_mode == FULL:
        return torch.ones(n * (seq_lens_sum + bs * n), dtype=torch.bool, device=device)
    return torch.empty(bs, n, n, dtype=torch.bool, device=device)


@triton.jit
def _build_tree(
    parents,
    seq_lens,
    positions,
    mask,
    next_token,
    next_sibling,
    nodes,
    most,
    mask_size,
    octets,
    parent_stride,
    parent_step,
    len_step,
    MODE: tl.constexpr,
    FULL: tl.constexpr,
    BITPACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    request, node = place // nodes, place % nodes
    column = tl.arange(0, BLOCK).to(tl.int64)
    there = column < nodes
    row = parents + request * parent_stride
    parent_of = tl.load(row + column * parent_step, mask=there, other=-1).to(tl.int64)
    parent = tl.load(row + node * parent_step).to(tl.int64)

    child = tl.min(tl.where(parent_of == node, column, nodes), 0)
    tl.store(next_token + place, tl.where(child < nodes, child, -1))
    is_sibling = (parent_of == parent) & (column > node) & (parent >= 0)
    sibling = tl.min(tl.where(is_sibling, column, nodes), 0)
    tl.store(next_sibling + place, tl.where(sibling < nodes, sibling, -1))

    # From the node to its root. Where a tree is deeper than it may be, as far as the reference.
    sees = column == node
    depth = tl.where(parent >= 0, 1, 0).to(tl.int64)
    while (parent >= 0) & (depth < most):
        sees = sees | (column == parent)
        parent = tl.load(row + parent * parent_step).to(tl.int64)
        depth += tl.where(parent >= 0, 1, 0)
    length = tl.load(seq_lens + request * len_step).to(tl.int64)
    tl.store(positions + place, length + depth)

    if MODE == BITPACKED:
        bits = tl.reshape(sees.to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
        octet = tl.arange(0, BLOCK // 8)
        packed = tl.sum(bits, 1).to(tl.uint8)
        tl.store(mask + place * octets + octet, packed, mask=octet < octets)
    elif MODE == FULL:
        start = request * nodes * nodes
        for first in range(0, request, BLOCK):
            before = first + column
            lens = tl.load(seq_lens + before * len_step, mask=before < request, other=0)
            start += tl.sum(lens.to(tl.int64), 0) * nodes
        bit = start + node * (length + nodes) + length + column
        # Lengths whose sum is not the one that sized the mask may not write beyond it.
        tl.store(mask + bit, sees.to(tl.uint8), mask=there & (bit < mask_size))
    else:
        tl.store(mask + place * nodes + column, sees.to(tl.uint8), mask=there)
