"""The accepted path, brought to the front: what it is, and its KV entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hwcore.kernels.triton import launching
from hwcore.kernels.triton.tuning import TUNED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["commit_paths", "move_kv"]


def commit_paths(
    predict: Tensor,
    accept_index: Tensor,
    accept_lens: Tensor,
    seq_lens: Tensor,
    cache_locs: Tensor | None,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Turn accepted paths into tokens, lengths and KV moves, as the reference of this name does.

    Notes
    -----
    One launch, one program a request. Mutates: none. Host sync: no. Graph-safe: yes.
    """
    bs, width = accept_index.shape
    tokens = torch.empty(bs, width, dtype=torch.int64, device=predict.device)
    new_lens, keep_lens = torch.empty_like(seq_lens), tokens.new_empty(bs)
    moves = None if cache_locs is None else (torch.empty_like(tokens), torch.empty_like(tokens))
    kv_src, kv_dst = moves or (None, None)
    launching.launch(
        _commit_paths,
        "commit_paths",
        (bs,),
        predict,
        accept_index,
        accept_lens,
        seq_lens,
        cache_locs,
        tokens,
        new_lens,
        keep_lens,
        kv_src,
        kv_dst,
        predict.shape[0] // bs if bs else 0,
        width,
        page_size,
        predict.stride(0),
        *accept_index.stride(),
        accept_lens.stride(0),
        seq_lens.stride(0),
        *((0, 0) if cache_locs is None else cache_locs.stride()),
        new_lens.stride(0),
        MOVES=cache_locs is not None,
        BLOCK=launching.power_of_two(width),
    )
    return tokens, new_lens, keep_lens, kv_src, kv_dst


@triton.jit
def _commit_paths(
    predict,
    accept_index,
    accept_lens,
    seq_lens,
    cache_locs,
    tokens,
    new_lens,
    keep_lens,
    kv_src,
    kv_dst,
    nodes,
    width,
    page_size,
    predict_step,
    index_stride,
    index_step,
    accept_step,
    seq_step,
    loc_stride,
    loc_step,
    new_step,
    MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, BLOCK).to(tl.int64)
    there = step < width
    place = accept_index + request * index_stride + step * index_step
    flat = tl.load(place, mask=there, other=-1).to(tl.int64)
    accepted = flat >= 0
    token = tl.load(predict + flat * predict_step, mask=accepted, other=-1).to(tl.int64)
    tl.store(tokens + request * width + step, token, mask=there)

    before = tl.load(seq_lens + request * seq_step)
    after = before + tl.load(accept_lens + request * accept_step).to(before.dtype)
    tl.store(new_lens + request * new_step, after)
    pages = (after.to(tl.int64) + page_size - 1) // page_size
    kept = tl.minimum(pages * page_size - before.to(tl.int64), nodes)
    tl.store(keep_lens + request, kept)

    if MOVES:
        # Node 0, the root, stands in where the path has ended: it always moves onto itself.
        row = cache_locs + request * loc_stride
        source = tl.where(accepted, flat - request * nodes, 0)
        target = tl.where(accepted, step, 0)
        out = request * width + step
        tl.store(kv_src + out, tl.load(row + source * loc_step, mask=there), mask=there)
        tl.store(kv_dst + out, tl.load(row + target * loc_step, mask=there), mask=there)


def move_kv(kv: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    """Copy KV entries of each request from slots to slots, as the reference of this name does.

    Raises
    ------
    RuntimeError
        If what follows the slots in the shape of ``kv`` is no view of one dimension.

    Notes
    -----
    One launch for all layers. An entry that stays where it is, is not touched. Mutates: ``kv``.
    Host sync: no. Graph-safe: yes.
    """
    entries = kv.view(torch.uint8) if kv.dtype.itemsize == 1 else kv
    entries = entries.view(*kv.shape[:2], kv[0, 0].numel() if kv.numel() else 0)
    layers, _, width = entries.shape
    block = TUNED["move_kv"].block
    launching.launch(
        _move_kv,
        "move_kv",
        (src.shape[0] if src.numel() else 0, triton.cdiv(width, block), layers),
        entries,
        src,
        dst,
        src.shape[1],
        width,
        *entries.stride(),
        *src.stride(),
        *dst.stride(),
        STEPS=launching.power_of_two(src.shape[1]),
        BLOCK=block,
    )
    return kv


@triton.jit
def _move_kv(
    entries,
    src,
    dst,
    steps,
    width,
    layer_stride,
    slot_stride,
    word_step,
    src_stride,
    src_step,
    dst_stride,
    dst_step,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: a slot's number times its length passes 2^31.
    request = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, STEPS).to(tl.int64)
    there = step < steps
    source = tl.load(src + request * src_stride + step * src_step, mask=there, other=0).to(tl.int64)
    target = tl.load(dst + request * dst_stride + step * dst_step, mask=there, other=0).to(tl.int64)
    word = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    layer = entries + tl.program_id(2).to(tl.int64) * layer_stride + word[None, :] * word_step
    moves = (source != target)[:, None] & (word < width)[None, :]
    read = tl.load(layer + source[:, None] * slot_stride, mask=moves)
    # One thread may read what another writes: nothing is written before all is read.
    tl.debug_barrier()
    tl.store(layer + target[:, None] * slot_stride, read, mask=moves)
