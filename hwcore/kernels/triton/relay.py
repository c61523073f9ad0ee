"""The operations of FutureMap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from hwcore.kernels.triton import launching
from hwcore.kernels.triton.tuning import TUNED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["assert_and_invalidate", "gather_rows"]


def gather_rows(rows: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """Copy rows of one tensor into another, as the reference of this name does.

    Notes
    -----
    One launch. Mutates: ``out``. Host sync: no. Graph-safe: yes.
    """
    bs, words = out.shape
    block = TUNED["gather_rows"].block
    launching.launch(
        _gather_rows,
        "gather_rows",
        (bs, triton.cdiv(words, block)),
        rows,
        indices,
        out,
        words,
        *rows.stride(),
        indices.stride(0),
        *out.stride(),
        BLOCK=block,
    )
    return out


@triton.jit
def _gather_rows(
    rows,
    indices,
    out,
    words,
    row_stride,
    row_step,
    index_step,
    out_stride,
    out_step,
    BLOCK: tl.constexpr,
):
    # 64 bits: a pool's row number times its length passes 2^31.
    request = tl.program_id(0).to(tl.int64)
    word = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    row = tl.load(indices + request * index_step).to(tl.int64)
    there = word < words
    copied = tl.load(rows + row * row_stride + word * row_step, mask=there)
    tl.store(out + request * out_stride + word * out_step, copied, mask=there)


def assert_and_invalidate(
    guards: Tensor, state: Tensor, indices: Tensor, outcome: Tensor
) -> tuple[Tensor, Tensor]:
    """Note whether a row had been empty, and empty the rows, as the reference of this name does.

    Notes
    -----
    One launch. Mutates: ``state``, ``outcome``. Host sync: no. Graph-safe: yes.
    """
    bs, width = indices.shape[0], state.shape[1]
    block = TUNED["assert_and_invalidate"].block
    launching.launch(
        _assert_and_invalidate,
        "assert_and_invalidate",
        (max(1, triton.cdiv(bs * width, block)),),
        guards,
        state,
        indices,
        outcome,
        bs,
        width,
        guards.stride(0),
        *state.stride(),
        indices.stride(0),
        BLOCK=block,
    )
    return outcome, state


@triton.jit
def _assert_and_invalidate(
    guards,
    state,
    indices,
    outcome,
    bs,
    width,
    guard_step,
    state_stride,
    state_step,
    index_step,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    if program == 0:
        # An empty batch leaves 0; no guard word of another one is the highest number there is.
        least = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for start in range(0, bs, BLOCK):
            request = start + lane
            word = tl.load(guards + request * guard_step, mask=request < bs, other=least)
            least = tl.minimum(least, word)
        tl.store(outcome, tl.where(bs > 0, tl.min(least, 0), 0))
    place = program.to(tl.int64) * BLOCK + lane
    request = place // width
    there = request < bs
    row = tl.load(indices + request * index_step, mask=there, other=0).to(tl.int64)
    tl.store(state + row * state_stride + (place % width) * state_step, -1, mask=there)
